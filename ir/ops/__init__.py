"""The dialect: every op defined once, by family, with meaning, type rule and cost."""
