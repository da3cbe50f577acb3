"""Keeps Transformers off the network, and its copies of exported model code in a folder of this run's own."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")  # read when transformers is imported
