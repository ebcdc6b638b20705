"""The engine: trunk stages that candidates really leave, with what they cost."""

from project.engine.decisions import ListExits, RowExits
from project.engine.engine import Engine
from project.engine.prepared import PreparedRequest, StreamTokens, prepare
from project.engine.scored import Scored, Scores
from project.engine.stream_cache import StreamCache

__all__ = [
    "Engine",
    "ListExits",
    "PreparedRequest",
    "RowExits",
    "Scored",
    "Scores",
    "StreamCache",
    "StreamTokens",
    "prepare",
]
