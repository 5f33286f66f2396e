"""Who gives rows away at the end of a job, so that no worker idles while others have some waiting.

Asks Ray for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.member import Member


def who_releases(members: Sequence[Member]) -> list[tuple[Member, float]]:
    """Who is to release what share of the rows it has not begun with: one for each idle worker.

    The ones that would need longest for theirs come first. Of a holder's rows the share goes that
    suits both speeds, so that both are through with them at about the same time.

    Args:
        members: those that are ready, and run no suspect.
    """
    idle = [member for member in members if not member.shards()]
    takers = idle[sum(member.is_asked("release") for member in members) :]
    if not takers:
        return []
    # One that has done nothing yet is taken to be as fast as the fastest.
    fastest = max((member.speed for member in members if member.speed), default=1.0)
    holders = [
        member
        for member in members
        if member.shards() and member.progress.num_unstarted and not member.is_asked("release")
    ]
    holders.sort(key=lambda member: -member.progress.num_unstarted / (member.speed or fastest))
    pairs = zip(takers, holders, strict=False)
    return [(holder, _share(taker, holder, fastest)) for taker, holder in pairs]


def _share(taker: Member, holder: Member, fastest: float) -> float:
    speed = taker.speed or fastest
    return speed / (speed + (holder.speed or fastest))
