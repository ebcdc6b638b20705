"""Scores requests and runs no layer behind the exit where a candidate leaves: the early-exit engine."""

from project.engine.cache import StreamCache as StreamCache
from project.engine.decisions import ListExits as ListExits
from project.engine.decisions import RowExits as RowExits
from project.engine.engine import Engine as Engine
from project.engine.requests import PreparedRequest as PreparedRequest
from project.engine.requests import Scored as Scored
from project.engine.requests import StreamTokens as StreamTokens
