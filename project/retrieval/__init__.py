"""Evidence for a candidate: what similar users thought of it, strictly before the question."""

from project.retrieval.base import Retriever
from project.retrieval.controls import ItemKNN, NoRetriever, RandomRetriever
from project.retrieval.factorisation import Taste
from project.retrieval.features import evidence_tables, evidence_warnings, request_evidence
from project.retrieval.lightgcn import LightGCN, VectorRetriever
from project.retrieval.text import LLMEmbedding, TextEncoder

__all__ = [
    "ItemKNN",
    "LLMEmbedding",
    "LightGCN",
    "NoRetriever",
    "RandomRetriever",
    "Retriever",
    "Taste",
    "TextEncoder",
    "VectorRetriever",
    "evidence_tables",
    "evidence_warnings",
    "request_evidence",
]
