"""Holds what came to the store until the text of the new item that it names is embedded."""

from collections.abc import Sequence

from project.serve.store import Arrived, Event


class Waiting:
    """New items whose texts are not embedded, and what waits for each: a user's events keep their order."""

    def __init__(self) -> None:
        # by item id, in the order in which they came
        self.texts = dict[str, str]()
        self.characters = 0  # of all texts
        # by item id
        self._held = dict[str, list[Arrived]]()
        # by user id: the item that the user's events wait for
        self._item_of = dict[str, str]()

    def add(self, item_id: str, text: str) -> None:
        """A new item; what names it is to be held."""
        self.texts[item_id] = text
        self.characters += len(text)
        self._held[item_id] = []

    def hold(self, what: Arrived, item_id: str) -> bool:
        """Hold an item, an event about it or a deletion, where it or an earlier event of the user waits."""
        if not isinstance(what, dict):
            item_id = self._item_of.get(what.user_id, item_id)
        if item_id not in self._held:
            return False
        self._held[item_id].append(what)
        if isinstance(what, Event):
            self._item_of[what.user_id] = item_id
        return True

    def release(self, texts: Sequence[str]) -> list[Arrived]:
        """What waited for these texts, which are embedded."""
        released = list[Arrived]()
        done = set(texts)
        for item_id in [item_id for item_id, text in self.texts.items() if text in done]:
            self.characters -= len(self.texts.pop(item_id))
            for what in self._held.pop(item_id):
                released.append(what)
                if isinstance(what, Event):
                    self._item_of.pop(what.user_id, None)
        return released
