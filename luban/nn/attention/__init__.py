"""How tokens look at each other: the masks that say who sees whom, and the forms of attention."""
