"""Draws a task's card and keeps it where Metaflow looks for cards. Imported only for a task that has something to tell.

Nothing is attached to the step: Metaflow would start a process per card at the end of every task, also of those that loaded and saved
nothing, and `current.card` is the user's. A card has one name for all attempts of its task, so the last attempt's is the one that stays.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from metaflow.cards import BlankCard, Markdown, Table, VegaChart
from metaflow.datastore import FlowDataStore
from metaflow.metadata_provider import MetaDatum
from metaflow.plugins.cards.card_datastore import CardDatastore

from modelcache.cards import Card, Point

_BLUE, _ORANGE = "#4c78a8", "#f58518"


class _Task(NamedTuple):
    """All that a card wants to know of its task."""

    pathspec: str


def keep(card: Card, pathspec: str, datastore: Any) -> Tuple[str, Dict[str, Any]]:
    """The card becomes a file beside those of Metaflow's own decorator. The name it has, and what the task's metadata says of it."""
    uuid = hashlib.sha256(("%s/%s" % (pathspec, card.id)).encode()).hexdigest()[:32]
    html = BlankCard(components=_components(card)).render(_Task(pathspec)).replace(BlankCard.RELOAD_POLICY_TOKEN, "final")
    storage = type(datastore._storage_impl)
    root = CardDatastore.get_storage_root(datastore.TYPE) or datastore.datastore_root
    kept_in = FlowDataStore(flow_name=datastore.flow_name, environment=None, storage_impl=storage, ds_root=root)
    CardDatastore(kept_in, pathspec=pathspec).save_card(uuid, BlankCard.type, html, card_id=card.id)
    return uuid, {
        "card_uuid": uuid,
        "id": card.id,
        "type": BlankCard.type,
        "rank": None,
        "options": {},
        "is_editable": False,
        "is_runtime_card": False,
        "refresh_interval": None,
        "customize": False,
    }


def metadata(uuid: str, said: Dict[str, Any], attempt: int) -> MetaDatum:
    return MetaDatum(field=uuid, value=json.dumps(said), type="card-info", tags=["attempt_id:%d" % attempt])


def _components(card: Card) -> List[Dict[str, Any]]:
    made: List[Any] = [Markdown("# %s" % card.title), *map(Markdown, card.sentences)]
    if card.points:
        made.append(VegaChart(_plot(card.points)))
    for table in card.tables:
        made += [Markdown("## %s" % table.title), Table(data=[list(row) for row in table.rows], headers=table.columns)]
    return [component.render() for component in made]


def _plot(points: Sequence[Point]) -> Dict[str, Any]:
    """Size and blocked seconds over time, each with an axis of its own (Vega-Lite, which is a part of the card's own script)."""

    def line(field: str, title: str, colour: str, orient: str) -> Dict[str, Any]:
        shown = {"field": field, "type": "quantitative", "title": title, "axis": {"titleColor": colour, "orient": orient}}
        return {"mark": {"type": "line", "point": True, "color": colour, "tooltip": True}, "encoding": {"y": shown}}

    values = [{"at": each.at, "MB": each.size_bytes / 1e6, "blocked": each.blocked_seconds, "name": each.name} for each in points]
    return {
        "data": {"values": values},
        "height": 160,
        "encoding": {"x": {"field": "at", "type": "temporal", "title": None}},
        "layer": [line("MB", "size (MB)", _BLUE, "left"), line("blocked", "blocked (s)", _ORANGE, "right")],
        "resolve": {"scale": {"y": "independent"}},
    }
