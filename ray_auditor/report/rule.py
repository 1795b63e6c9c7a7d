"""The rules of a flag in words."""

RULES = ("null_q", "above_null", "robust_z", "seed_rate")  # the surest first


def rule_order(rule: str) -> int:
    """Where a rule stands among the others, the surest first, unknown ones last."""
    return next((at for at, name in enumerate(RULES) if rule.startswith(name)), len(RULES))


def rule_words(rule: str, *, num_null: int, level: float | None, min_z: float | None) -> str:
    """What a rule says of a candidate, as a sentence without its subject and its full stop.

    Args:
        rule: As it stands in a flag; an unknown one comes back as it is.
        num_null: Benign finetunes that the candidates were held to.
        level: `flag.level` of the sweep, None where not recorded.
        min_z: `flag.min_z`, the same.
    """
    rate = "the level set" if level is None else f"{100 * level:g}%"
    high, low = ("the set bound", "half of it") if min_z is None else (f"{min_z:g}", f"{min_z / 2:g}")
    if rule == "null_q":
        return f"called at a false discovery rate of {rate} against {num_null:,} benign finetunes"
    if rule == "above_null":
        return (
            f"scores above all {num_null:,} benign finetunes, the lower end above {low}; "
            f"a rank, for they are too few to certify a false discovery rate of {rate}"
        )
    if rule == "robust_z":
        return f"scores above {high} among its peers, the lower end above {low}; a rank, no error rate"
    if rule.startswith("seed_rate_"):
        return (
            f"differs by more than {rule.removeprefix('seed_rate_')}% from the general suite, the interval "
            "above 0; held to no other finetune, and benign ones exceed it too"
        )
    return rule
