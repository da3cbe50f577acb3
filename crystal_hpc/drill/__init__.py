"""`crystal drill`: faults injected into a toy run on the user's own cluster, and proof that none of them mattered."""
