"""Language to SQL: a question in words becomes a query that is held to the schema, checked, explained and run read-only."""
