"""CTR networks of the field (DeepFM, DCN-v2, DIN), scored beside the LLM on the same rows from the same past."""

from project.floors.peers.grid import LEFT_OUT, LIBRARY, PEERS, peer_floors, peer_settings, peers_installed

__all__ = ["LEFT_OUT", "LIBRARY", "PEERS", "peer_floors", "peer_settings", "peers_installed"]
