"""Planning: a costed `Plan` from a problem, budgets and a machine."""
