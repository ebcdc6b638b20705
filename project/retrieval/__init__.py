"""Finds what similar users answered about a candidate, strictly before the request: the retrieved features."""

from project.retrieval.base import Retriever
from project.retrieval.controls import ItemKNN, NoRetriever
from project.retrieval.factorisation import MatrixFactorisation
from project.retrieval.features import RetrievedFeatures
from project.retrieval.lightgcn import LightGCN, VectorRetriever
from project.retrieval.text import TextEncoder

__all__ = [
    "ItemKNN",
    "LightGCN",
    "MatrixFactorisation",
    "NoRetriever",
    "RetrievedFeatures",
    "Retriever",
    "TextEncoder",
    "VectorRetriever",
]
