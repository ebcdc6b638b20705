"""Retrieved features for a candidate: what similar users thought of it, strictly before the question."""

from project.retrieval.base import Retriever
from project.retrieval.controls import ItemKNN, NoRetriever, RandomRetriever
from project.retrieval.factorisation import MatrixFactorisation
from project.retrieval.features import request_retrieved, retrieved_tables, retrieved_warnings
from project.retrieval.lightgcn import LightGCN, VectorRetriever
from project.retrieval.text import LLMEmbedding, TextEncoder

__all__ = [
    "ItemKNN",
    "LLMEmbedding",
    "LightGCN",
    "MatrixFactorisation",
    "NoRetriever",
    "RandomRetriever",
    "Retriever",
    "TextEncoder",
    "VectorRetriever",
    "request_retrieved",
    "retrieved_tables",
    "retrieved_warnings",
]
