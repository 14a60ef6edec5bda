"""Behaviour sequences made from a log: what a user liked before each row."""

import polars as pl


def add_behaviour_sequence(
    log: pl.DataFrame, *, user: str, item: str, time: str, label: str, last: int
) -> pl.DataFrame:
    """The log with a column ``history``: the items its user liked before.

    Only rows of the same user with label 1 and a strictly smaller time count, so that neither the row's own label
    nor one of the same moment shows. Items of one time keep the order of the log.

    Args:
        log: one row per event; times without nulls.
        user, item, time, label: its columns.
        last: the newest so many items are kept.

    Returns:
        The rows of ``log`` in their order, ``history`` a List of the items, oldest first, newest last, empty where
        there is none.
    """
    liked = log.filter(pl.col(label) == 1).sort(time, maintain_order=True)
    liked = liked.group_by(user, maintain_order=True).agg(pl.col(item).alias("_liked"))
    moments = log.group_by(user, time).agg(pl.col(label).cast(pl.UInt32).sum().alias("_now")).sort(user, time)
    moments = moments.join(liked, on=user, how="left", maintain_order="left")
    before = (pl.col("_now").cum_sum() - pl.col("_now")).over(user)
    kept = pl.min_horizontal(before, pl.lit(last))
    moments = moments.select(
        user,
        time,
        pl.col("_liked").fill_null([]).list.slice(before.cast(pl.Int64) - kept, kept).alias("history"),
    )
    return log.join(moments, on=[user, time], how="left", maintain_order="left")


def last_liked(log: pl.DataFrame, *, user: str, item: str, time: str, label: str, last: int) -> pl.DataFrame:
    """The rows of a log that histories of rows after it may still show: a log goes on from these as from all of it.

    Args:
        log: as for :func:`add_behaviour_sequence`; later rows have no earlier time.
        user, item, time, label: its columns.
        last: the newest so many items of a history.

    Returns:
        Per user the last ``last`` rows with label 1 before the log's last time, and all at that time, in their order.
    """
    liked = log.filter(pl.col(label) == 1)
    now = log[time].max()
    earlier = liked.filter(pl.col(time) < now).sort(time, maintain_order=True)
    kept = earlier.group_by(user, maintain_order=True).tail(last).sort(time, maintain_order=True)
    return pl.concat([kept.select(log.columns), liked.filter(pl.col(time) == now)])
