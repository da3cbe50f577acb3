"""What a user writes down: schema (the keys), load (YAML, overrides), check (what must agree), derive, describe."""
