"""Decodes a document or row of a token store, or the samples of a step of a run: `crystal data show` as a script.

python tools/show_store.py stores/web --tokenizer tokenizer/ --document 17
python tools/show_store.py runs/my-run --phase code --step 1000 --sample 3
"""

from crystal_hpc.cli_proof import show
from crystal_hpc.progress import run

if __name__ == "__main__":
    run(show.main)
