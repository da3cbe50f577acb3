"""A run as jobs: request, submit, task (what each rank runs), journal, status."""
