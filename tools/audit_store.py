"""Proves what is in token stores, every byte, document and count: `crystal data audit` as a script.

Exit code 0 if nothing bad was found, 1 if something was, 2 for a mistake in what was asked for.

    python tools/audit_store.py stores/* --tokenizer tokenizer/
    python tools/audit_store.py stores/web --held-out stores/web-held-out --json findings.json
"""

from crystal_hpc.cli_proof import audit
from crystal_hpc.progress import run

if __name__ == "__main__":
    run(audit.main)
