"""What several test files share: the float64 truth, the reference model, random configurations."""
