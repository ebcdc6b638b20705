"""DeepFM, DCN-v2 and DIN of torch-rechub, wired to the fields of `features.py`.

Unusual here: DIN attends to what the user liked and to what they disliked apart, each with weights of its own, over
the candidate's own item vectors; places without a row hold the vector 0, so they add nothing to the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from project.counting import FEATURES
from project.floors.peers.features import HISTORY, PADDING, SCALED, PeerFeatures

if TYPE_CHECKING:
    from torch_rechub.basic.features import SequenceFeature, SparseFeature

LAYERS: dict[str, Any] = {"dims": [64, 32], "dropout": 0.2}
CROSSES = 2
ATTENTION_LAYERS = [16]


def deepfm(features: PeerFeatures, embedding: int) -> nn.Module:
    """Guo et al. 2017, arXiv 1703.04247: a factorisation machine and a deep net on the same vectors.

    Args:
        features: Fields and their numbers of codes.
        embedding: Size of a vector.
    """
    from torch_rechub.models.ranking import DeepFM

    fields = _fields(features, embedding)
    return _module(DeepFM([*fields, _scaled()], fields, LAYERS))


def dcn_v2(features: PeerFeatures, embedding: int) -> nn.Module:
    """Wang et al. 2021, arXiv 2008.13535: cross layers with full matrices beside a deep net. Arguments as `deepfm`."""
    from torch_rechub.models.ranking import DCNv2

    fields = [*_fields(features, embedding), _scaled()]
    return _module(DCNv2(fields, CROSSES, LAYERS, use_low_rank_mixture=False))


def din(features: PeerFeatures, embedding: int) -> nn.Module:
    """Zhou et al. 2018, arXiv 1706.06978: the candidate attends to the user's history. Arguments as `deepfm`."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking import DIN

    item, *others = _fields(features, embedding, first="item")
    size = item.vocab_size
    history = [
        SequenceFeature(name, size, embedding, pooling="concat", shared_with="item", padding_idx=PADDING)
        for name in HISTORY
    ]
    again = SparseFeature("item", size, embedding, padding_idx=PADDING)  # one target a history
    return _module(DIN(others, history, [item, again], LAYERS, {"dims": ATTENTION_LAYERS}))


def _fields(
    features: PeerFeatures, embedding: int, first: str = "user"
) -> list[SparseFeature | SequenceFeature]:
    from torch_rechub.basic.features import SequenceFeature, SparseFeature

    names = sorted(features.sizes, key=lambda name: name != first)
    padded = {name: None if name in FEATURES else PADDING for name in names}
    return [
        *(SparseFeature(n, features.sizes[n], embedding, padding_idx=padded[n]) for n in names),
        *(
            SequenceFeature(name, size, embedding, pooling="mean", padding_idx=PADDING)
            for name, size in features.word_sizes.items()
        ),
    ]


def _scaled() -> Any:
    from torch_rechub.basic.features import DenseFeature

    return DenseFeature(SCALED, embed_dim=len(FEATURES))


def _module(network: Any) -> nn.Module:
    assert isinstance(network, nn.Module)
    return network
