"""Evidence for a candidate: what similar users thought of it, strictly before the question."""

from project.retrieval.base import Retriever
from project.retrieval.controls import ItemKNN, NoRetriever, RandomRetriever
from project.retrieval.evidence import evidence_tables, evidence_warnings, request_evidence
from project.retrieval.lightgcn import LightGCN
from project.retrieval.llm import LLMEmbedding
from project.retrieval.taste import Taste
from project.retrieval.text import TextEncoder
from project.retrieval.vectors import VectorRetriever

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
