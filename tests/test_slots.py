from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.slots import SlotCache

NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 2, 3, 4
CPU = torch.device("cpu")


class Mirror:
    """A cache beside what it must hold: for each row and layer, (heads, length, head size)."""

    def __init__(self, seed: int, devices: Sequence[str] = ("cpu", "cpu")) -> None:
        self.chance = random.Random(seed)
        self.devices = devices
        self.cache = SlotCache(NUM_LAYERS, num_slots=6, capacity=40)
        self.rows: list[list[Tensor]] = []

    def prefilled(self, lengths: Sequence[int]) -> SlotCache:
        """Another cache with rows of these lengths, all new."""
        other = SlotCache(NUM_LAYERS, len(lengths), max(lengths))
        other.place(lengths, num_new=max(lengths))
        for layer, device in zip(other.layers, self.devices, strict=True):
            shape = (len(lengths), NUM_HEADS, max(lengths), HEAD_SIZE)
            states = torch.randn(shape, device=device)
            layer.update(states, -states)
        other.advance(max(lengths))
        return other

    def append(self) -> None:
        room = min(self.cache.window.end or 40, 40)
        most = min(self.cache.num_slots - len(self.rows), 3)
        if most < 1 or room < 1:
            return
        lengths = [self.chance.randint(1, min(room, 12)) for _ in range(most)]
        other = self.prefilled(lengths)
        chosen = [self.chance.randrange(most) for _ in range(most)]
        self.cache.append(other, chosen)
        for row in chosen:
            start = max(lengths) - lengths[row]
            self.rows.append([layer.keys[row, :, start:].clone() for layer in other.layers])

    def decode(self) -> None:
        if not self.rows or self.cache.window.end == self.cache.capacity:
            return
        for number, layer in enumerate(self.cache.layers):
            shape = (len(self.rows), NUM_HEADS, 1, HEAD_SIZE)
            states = torch.randn(shape, device=self.devices[number])
            layer.update(states, -states)
            for slot, row in enumerate(self.rows):
                row[number] = torch.cat([row[number], states[slot]], dim=1)
        self.cache.advance(1)

    def keep(self) -> None:
        kept = [slot for slot in range(len(self.rows)) if self.chance.random() < 0.7]
        order = self.cache.keep(kept)
        assert sorted(order) == kept
        assert sum(slot != row for slot, row in enumerate(order)) <= len(self.rows) - len(kept)
        self.rows = [self.rows[row] for row in order]

    def reorder(self) -> None:
        order = self.chance.sample(range(len(self.rows)), len(self.rows))
        self.cache.reorder(order)
        self.rows = [self.rows[row] for row in order]

    def move(self) -> None:
        if self.rows:
            window = self.cache.window
            self.cache.move_end(self.chance.randint(window.length, self.cache.capacity))

    def resize(self) -> None:
        if self.rows:
            least = len(self.rows), self.cache.window.length
            self.cache.resize(least[0] + self.chance.randint(0, 3), least[1] + 8)

    def check(self) -> None:
        window = self.cache.window
        assert self.cache.lengths == [row[0].shape[1] for row in self.rows]
        assert window.num_rows == len(self.rows)
        assert window.length == max(self.cache.lengths, default=0)
        for number, layer in enumerate(self.cache.layers):
            if self.rows:
                assert {layer.keys.device.type, layer.values.device.type} == {self.devices[number]}
            for slot, row in enumerate(self.rows):
                columns = slice(window.end - row[number].shape[1], window.end)
                if layer.keys.is_meta:
                    continue  # it has no numbers
                torch.testing.assert_close(layer.keys[slot, :, columns], row[number])
                torch.testing.assert_close(layer.values[slot, :, columns], -row[number])


@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("cpu", "meta"), ("meta", "cpu")], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_rows_keep_their_states_whatever_happens_around_them(
    seed: int, devices: Sequence[str]
) -> None:
    """Through appending, decoding, freeing, reordering, moving and resizing in any order.

    Layers on another device, of which a CPU has only one without numbers, keep to it.
    """
    mirror = Mirror(seed, devices)
    acts = [mirror.append, mirror.decode, mirror.decode, mirror.keep]
    acts += [mirror.reorder, mirror.move, mirror.resize]
    mirror.append()
    num_rows_seen = set()
    for _ in range(80):
        mirror.chance.choice(acts)()
        mirror.check()
        num_rows_seen.add(len(mirror.rows))
    assert len(num_rows_seen) >= 4


def test_the_model_sees_views() -> None:
    """A decode step copies nothing but the new column: what attention reads is the buffer."""
    mirror = Mirror(0)
    mirror.append()
    mirror.cache.move_end(30)
    layer = mirror.cache.layers[0]
    states = torch.randn(len(mirror.rows), NUM_HEADS, 1, HEAD_SIZE)
    keys, values = layer.update(states, states)
    assert keys.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
    assert values.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
    window = mirror.cache.window
    assert keys.shape == (len(mirror.rows), NUM_HEADS, window.length + 1, HEAD_SIZE)
    assert layer.get_mask_sizes(1) == (window.length + 1, 0)
    assert layer.get_seq_length() == window.length


def test_masks_and_positions_count_from_each_rows_start() -> None:
    """For prompts, padding is hidden and has position 0; a decode step sees the new column too."""
    cache = SlotCache(NUM_LAYERS, num_slots=2, capacity=3)
    cache.place([3, 1], num_new=3)
    mask, positions = cache.model_inputs(3, CPU)
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    cache.advance(3)
    mask, positions = cache.model_inputs(1, CPU)
    assert mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert positions.tolist() == [[3], [1]]


def test_a_prefix_stands_right_before_what_is_computed() -> None:
    """Each row gets as much of it as it does not compute itself, without a gap."""
    mirror = Mirror(0)
    prefix = mirror.prefilled([5])
    cache = SlotCache(NUM_LAYERS, num_slots=3, capacity=9)
    cache.place([9, 7, 4], num_new=4)  # the last computes all of its four tokens
    cache.fill(prefix)
    for mine, theirs in zip(cache.layers, prefix.layers, strict=True):
        torch.testing.assert_close(mine.keys[0, :, :5], theirs.keys[0])
        torch.testing.assert_close(mine.keys[1, :, 2:5], theirs.keys[0, :, :3])
        assert not mine.keys[2].any()


def test_a_slot_can_be_blanked() -> None:
    """After numbers that are none, the slot's next row finds zeros; others keep theirs."""
    mirror = Mirror(0)
    mirror.append()
    cache = mirror.cache
    before = cache.layers[1].keys[1].clone()
    cache.layers[1].keys[0] = torch.nan
    cache.blank(0)
    assert not cache.layers[1].keys[0].any()
    torch.testing.assert_close(cache.layers[1].keys[1], before)


def test_the_size_of_a_token_counts_keys_and_values_of_all_layers() -> None:
    """In bytes, told from the states themselves, in all and for each device."""
    num_bytes = 2 * NUM_HEADS * HEAD_SIZE * 4
    assert Mirror(0).prefilled([2]).num_token_bytes == NUM_LAYERS * num_bytes
    spread = Mirror(0, ("cpu", "meta")).prefilled([2]).token_bytes
    assert spread == {CPU: num_bytes, torch.device("meta"): num_bytes}
