"""Tasks of the Chomsky hierarchy, and what sequence models learn of them (Delétang et al. 2023)."""
