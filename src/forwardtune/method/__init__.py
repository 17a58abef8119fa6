"""L2: the paper, in numbers: estimators, rules, moments, records. Nothing here knows a model."""
