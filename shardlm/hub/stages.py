"""The one place that knows how the stages of a pipeline hold the layers of a model whose files hold them in order."""


def require_order(pipe: int) -> None:
    """Raise ValueError where the layers of the stacked parameters may not be in the model's order."""
    if pipe > 1:
        raise ValueError(
            f"pipe={pipe}: Hugging Face folders are read and written on layouts without pipeline stages; use pipe=1, "
            "and move the parameters with a checkpoint (sl.save, sl.restore)"
        )
