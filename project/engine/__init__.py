"""The engine: backbone stages that candidates really leave, with what they cost."""

from project.engine.cache import StreamCache
from project.engine.decisions import ListExits, RowExits
from project.engine.engine import Engine
from project.engine.requests import PreparedRequest, Scored, Scores, StreamTokens

__all__ = [
    "Engine",
    "ListExits",
    "PreparedRequest",
    "RowExits",
    "Scored",
    "Scores",
    "StreamCache",
    "StreamTokens",
]
