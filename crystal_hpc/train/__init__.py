"""The training of a run, from the first step to the last. Read `loop` first."""
