"""From a problem, budgets and a machine to a costed `Plan`; only `measure` has effects."""
