"""Retrieval-augmented LLM recommendation with early exits."""

import os

# oneDNN and torch's binding each keep a kernel for every number of rows that a layer has
# met, by default 1,024: in an hour a gigabyte
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")
