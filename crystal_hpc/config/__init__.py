"""What a user writes down before a run: schema (the keys), load (YAML and overrides), check (what must agree), derive."""
