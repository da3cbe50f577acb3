"""What is known before a run (plan), what was consumed (ledger), and what happened (html)."""
