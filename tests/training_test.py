"""Tests of the trainer that need neither a GPU nor trained weights: python -m unittest tests/training_test.py"""

import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import checkpoint
import clips
import evaluate
import make_tiny
import model as m
import noise
import optim
import overworld
import reference
import sampler
import text_probe
from run import Run
from transformer_stage import FROM_NOTHING, RESUMED, Mask, TransformerTrainer


def tiny_model(seed: int = 0) -> m.WorldModel:
    torch.manual_seed(seed)
    model = m.WorldModel(m.tiny_config(len(make_tiny.WORDS))).requires_grad_(False)
    make_tiny.randomise(model)
    return model.eval()


class NoiseTest(unittest.TestCase):
    def test_philox_known_answers(self):
        """Vectors published with the Random123 library (kat_vectors, philox4x32-10)."""
        zeros = noise.philox(np.zeros(4, np.uint64), (0, 0))
        self.assertEqual([int(w) for w in zeros], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
        ones = noise.philox(np.full(4, 0xFFFFFFFF, np.uint64), (0xFFFFFFFF, 0xFFFFFFFF))
        self.assertEqual([int(w) for w in ones], [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD])

    def test_is_standard_normal(self):
        x = noise.normal_noise(3, 5, 1, (16, 16, 320))
        self.assertLess(abs(x.mean()), 0.02)
        self.assertLess(abs(x.std() - 1), 0.02)

    def test_a_prefix_does_not_depend_on_the_count(self):
        np.testing.assert_array_equal(noise.normal_noise(1, 2, 3, (10,)), noise.normal_noise(1, 2, 3, (40,))[:10])


class ModelTest(unittest.TestCase):
    def test_frame_by_frame_equals_teacher_forcing(self):
        """Playing with a cache gives the velocities that the block mask gives when trained on a whole clip."""
        model = tiny_model()
        net, frames = model.transformer, 3
        z, clean = torch.randn(2, 1, frames, 16, 16, 32)
        camera = torch.rand(1, frames, 2) * 192
        times = torch.tensor([[0.0, 1.0, 40.0]])
        t = torch.tensor([[0.9, 0.3, 0.6]])
        ids = torch.tensor([[5, 7, 9, 0, 0]])
        text, text_mask = model.text_encoder(ids), (ids != 0)[:, None, None, :]
        tokens = frames * 128
        index = torch.arange(2 * tokens)
        mask = m.clean_frame_mask(index[:, None], index[None], tokens)
        attend = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        layers = [lambda *args, block=block: block(*args, attend) for block in net.blocks]
        together = net(clean, z, torch.zeros_like(t), t, camera, times, text, text_mask, layers)

        cache = m.KeyValueCache(net.config, 1, frames, "cpu", torch.float32)
        keys = net.text_keys(text)
        for f in range(frames):
            v = net.frame(z[:, f], t[0, f].item(), camera[:, f], int(times[0, f]), keys, text_mask, cache)
            torch.testing.assert_close(v, together[:, f], rtol=1e-4, atol=1e-4)
            net.frame(clean[:, f], 0.0, camera[:, f], int(times[0, f]), keys, text_mask, cache)
            cache.commit()

    def test_padding_changes_nothing(self):
        model = tiny_model()
        short = model.text_encoder(torch.tensor([[5, 7, 9]]))
        padded = model.text_encoder(torch.tensor([[5, 7, 9, 0, 0, 0]]))
        torch.testing.assert_close(padded[:, :3], short, rtol=1e-5, atol=1e-5)

    def test_a_walk_round_the_torus_changes_no_spatial_phase(self):
        net = tiny_model().transformer
        times = torch.zeros(1, 1)
        here, there = torch.tensor([[[3.25, 7.5]]]), torch.tensor([[[3.25 + 192, 7.5 - 384]]])
        torch.testing.assert_close(net.rope(here, times), net.rope(there, times), rtol=0, atol=1e-4)

    def test_window_keeps_sink_and_recent_frames(self):
        config = tiny_model().transformer.config
        cache = m.KeyValueCache(config, 1, 6, "cpu", torch.float32, window=2, sink=1)
        for f in range(6):
            k = torch.full((1, 1, 128, 64), 0.0)
            seen = cache.attend(0, k, k, torch.full_like(k, float(f)))
            cache.commit()
        self.assertAlmostEqual(seen.mean().item(), (0 + 3 + 4 + 5) / 4, places=5)

    def test_weight_file_round_trip(self):
        model = tiny_model()
        state = model.state_dict()
        exact = m.unpack(m.pack(state, "f32"))
        self.assertEqual(set(exact), set(state))
        for name, value in m.unpack(m.pack(state, "int8")).items():
            rows = state[name].flatten(1) if state[name].ndim > 1 else state[name][None]
            bound = rows.abs().amax(1).max() / 127 * 0.51
            self.assertLessEqual((value - state[name]).abs().max(), bound, name)

    def test_pixel_shuffle_layout(self):
        x = torch.arange(8.0).view(1, 8, 1, 1)
        out = torch.nn.functional.pixel_shuffle(x, 2)
        self.assertEqual(out[0, 1].tolist(), [[4, 5], [6, 7]])


class MaskTest(unittest.TestCase):
    def test_shots_see_nothing_of_each_other(self):
        tokens = 8 * 128
        frames = torch.arange(0, 2 * tokens, 128)
        see = m.clean_frame_mask(frames[:, None], frames[None], tokens, groups=True)
        noisy = see[8:]
        self.assertEqual(noisy.sum(1).tolist(), [1, 1, 1, 2, 1, 2, 3, 4])  # itself and the earlier ones of its shot
        self.assertEqual(noisy[:, 8:].int().tolist(), torch.eye(8).int().tolist())
        self.assertFalse(see[:8, 8:].any())

    def test_dense_attention_equals_one_masked_softmax(self):
        mask = Mask("shots", 128, torch.device("cpu"), flex=False)
        q, k, v = torch.randn(3, 1, 1, 2 * mask.tokens, 8)
        index = torch.arange(2 * mask.tokens)
        see = m.clean_frame_mask(index[:, None], index[None], mask.tokens, True)
        scores = (q @ k.mT / 8**0.5).masked_fill(~see, -torch.inf)
        torch.testing.assert_close(mask.dense_attention(q, k, v), scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


class OptimTest(unittest.TestCase):
    def test_orthogonalised_has_singular_values_near_one(self):
        for shape in ((3, 32, 96), (2, 96, 32)):
            values = torch.linalg.svdvals(optim.orthogonalised(torch.randn(shape)))
            self.assertGreater(values.min(), 0.4)
            self.assertLess(values.max(), 1.4)

    def test_rates_multiply_the_step(self):
        named = {f"{part}.layers.{k}.weight": torch.nn.Parameter(torch.ones(8, 8)) for part in "ab" for k in range(2)}
        named |= {f"{part}.bias": torch.nn.Parameter(torch.ones(8)) for part in "ab"}
        optimiser = optim.Optimiser(named, lambda name: name.startswith("a"), 0.0)
        for p in named.values():
            p.grad = torch.randn_like(p)
        optimiser.step(0.1)
        for name, p in named.items():
            self.assertEqual(bool((p == 1).all()), name.startswith("a"), name)
        again = optim.Optimiser(named, lambda name: name.startswith("a"), 0.5)
        again.load_state_dict(optimiser.state_dict())
        self.assertEqual([rate for rate, _, _ in again.parts], [1.0, 0.5])

    def test_the_average_starts_short(self):
        p = torch.nn.Parameter(torch.zeros(1))
        ema = optim.Ema([p], 0.998)
        p.data.fill_(1)
        for _ in range(200):
            ema.update()
        self.assertGreater(ema.values[0].item(), 0.95)


class SamplerTest(unittest.TestCase):
    def test_levels(self):
        levels = sampler.noise_levels(4, 2.5)
        self.assertEqual((levels[0], levels[-1]), (1, 0))
        self.assertAlmostEqual(levels[2], 2.5 * 0.5 / 1.75)

    def test_an_exact_velocity_reaches_the_target(self):
        target = torch.randn(1, 4)
        for kind in ("ode", "renoise"):
            z = sampler.sample_frame(lambda z, t, k: (z - target) / t, lambda k: torch.randn(1, 4), 3, 2.5, kind)
            torch.testing.assert_close(z, target, rtol=1e-4, atol=1e-4)


    def test_a_frame_without_history_has_its_own_levels(self):
        own = m.SamplerConfig("ode", 4, 2.5)
        self.assertEqual([own.of_frame(seen) for seen in (True, False)], [(4, 2.5)] * 2)
        own = m.SamplerConfig("ode", 4, 1.5, first_steps=12, first_shift=3.0)
        self.assertEqual([own.of_frame(seen) for seen in (True, False)], [(4, 1.5), (12, 3.0)])
        own.num_steps = 20
        self.assertEqual(own.of_frame(False), (20, 3.0))


class OwnContextTest(unittest.TestCase):
    def test_own_frames_follow_each_other_or_stand_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            trainer = TransformerTrainer(Run(0, 1, folder, "cpu", False), tiny_model(), {"short": 1}, RESUMED)
        own = trainer.own_frames(400, 32).int()
        drifted = ((own.diff(dim=1) >= 0).all(1)).float().mean().item()
        self.assertTrue(0.7 < drifted < 0.88, drifted)  # those that stand alone may fall so by chance
        self.assertAlmostEqual(own.float().mean().item(), 0.5, delta=0.06)


class CourseTest(unittest.TestCase):
    def test_clips_of_a_resumed_run(self):
        early = [RESUMED.kind(step, 0.2) for step in range(4)]
        self.assertEqual(early, ["shots", "short", "memory", "memory"])
        late = [RESUMED.kind(step, 0.9) for step in range(4)]
        self.assertEqual(late, ["shots", "memory", "memory", "memory"])
        self.assertEqual([FROM_NOTHING.kind(step, 0.2) for step in range(2)], ["shots", "short"])

    def test_rate_warms_up_and_decays(self):
        self.assertLess(RESUMED.rate(0, 0.0), 0.01 * RESUMED.learning_rate)
        self.assertEqual(RESUMED.rate(150, 0.1), RESUMED.learning_rate)
        self.assertAlmostEqual(RESUMED.rate(9000, 1.0), RESUMED.decay_to * RESUMED.learning_rate)


class ProbeTest(unittest.TestCase):
    def test_inner_points_lie_in_their_region(self):
        """Borders are warped: the world itself says where its regions lie, and they may reach in a little."""
        pool = overworld.Pool(77, 4)
        right = []
        for map_idx in range(4):
            x, y = (16 * v.numpy() for v in text_probe.region_points(50, torch.device("cpu")))
            for sample in range(50):
                right += [pool.region_at(map_idx, int(x[sample, r]), int(y[sample, r])) == r for r in range(9)]
        self.assertGreater(np.mean(right), 0.985)

    def test_targets_are_the_properties_of_the_place(self):
        properties = torch.arange(45).view(1, 9, 5)
        x, y = torch.tensor([[32.0, 160.0 - 192, 63.0, 96.0 + 192]]), torch.tensor([[32.0, 160.0, 32.0, 32.0]])
        targets = text_probe.token_properties(x, y, properties)
        self.assertEqual(targets[0, :, 0].tolist(), [0, 40, clips.UNSAID, 5])

    def test_what_is_not_said_does_not_count(self):
        logits = torch.randn(2, 9, sum(clips.PROPERTIES.values()))
        unsaid = torch.full((2, 9, 5), clips.UNSAID)
        self.assertEqual(text_probe.property_loss(logits, unsaid)[0].item(), 0)
        one = unsaid.clone()
        one[1, 3] = torch.tensor([7, 0, 2, 1, 4])
        begins = np.cumsum([0, *clips.PROPERTIES.values()])[:-1]
        certain = torch.zeros_like(logits)
        certain[1, 3, torch.from_numpy(begins) + one[1, 3]] = 50
        loss, accuracy = text_probe.property_loss(certain, one)
        self.assertLess(loss.item(), 1e-6)
        self.assertEqual(accuracy.item(), 1)

    def test_one_land_tells_its_theme_alone(self):
        info = {name: np.full(9, 2) for name in clips.PROPERTIES} | {"mentioned": np.ones(9)}
        told = clips.told_properties(info)
        self.assertEqual(told[:, 0].tolist(), [2] * 9)
        self.assertTrue((told[:, 1:] == clips.UNSAID).all())
        info["theme"], info["mentioned"] = np.arange(9) % 8, np.arange(9) % 2
        told = clips.told_properties(info)
        self.assertEqual(told[1].tolist(), [1, 2, 2, 2, 2])
        self.assertTrue((told[0] == clips.UNSAID).all())

    def test_store_gives_aligned_prompts(self):
        store = text_probe.PromptStore(64, 384, 1, pool_maps=4, wordings=4)
        ids, properties = store.sample(8)
        store.stop()
        self.assertEqual((len(ids), ids.shape[1] % 64), (8, 0))
        self.assertEqual(properties.shape, (8, 9, 5))
        self.assertTrue((ids[:, 0] > 0).all())

    def test_a_probe_asks_by_place(self):
        """Padding is not asked."""
        probe = text_probe.TextProbe(24, 64, 2)
        text, places = torch.randn(1, 6, 64), torch.randn(1, 9, 24)
        mask = torch.tensor([True, True, True, True, False, False])[None, None, None]
        whole = probe(places, text, mask)
        self.assertEqual(whole.shape, (1, 9, sum(clips.PROPERTIES.values())))
        torch.testing.assert_close(whole, probe(places, text[:, :4], mask[..., :4]))


class WorldTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.pool = overworld.Pool(9, 2)

    def test_batches_are_what_they_say(self):
        rng = np.random.default_rng(0)
        for kind in ("shots", "short"):
            batch = clips.make_batch(kind, 2, self.pool, rng, 384, pin=False)
            frames = clips.CLIP_FRAMES[kind]
            self.assertEqual(batch.pixels.shape, (2, frames, 128, 256, 3))
            self.assertEqual(batch.ids.shape, (2, 384))
            self.assertTrue((batch.camera * 4 == (batch.camera * 4).round()).all())
            self.assertTrue(((batch.camera >= 0) & (batch.camera < 192)).all())

    def test_a_strayed_map_goes_on_with_one_theme_where_the_prompt_tells_another(self):
        pool = overworld.Pool(clips.TRAINING_SEED, 8)
        xy = pool.paths(3, 64, overworld.STEADY, True)
        strayed = clips.strayed(pool, xy, np.random.default_rng(1))
        changed = 0
        for m in range(pool.num_maps):
            before, after = pool.info(m), strayed.info(m)
            told = before["mentioned"] != 0
            np.testing.assert_array_equal(before["theme"][~told], after["theme"][~told])
            self.assertEqual(len(set(after["theme"][told])), 1)
            for name in ("sea", "forest", "landmark", "colour"):
                np.testing.assert_array_equal(before[name], after[name])
            changed += int((before["theme"] != after["theme"]).any())
        self.assertGreater(changed, 3)

    def test_some_batches_have_strayed_context(self):
        pool, rng = overworld.Pool(clips.TRAINING_SEED, 2), np.random.default_rng(0)
        batches = [clips.make_batch("shots", 2, pool, rng, 384, False) for _ in range(24)]
        strayed = [batch for batch in batches if batch.seen is not None]
        self.assertTrue(0 < len(strayed) < len(batches))
        self.assertTrue(any((batch.seen != batch.pixels).any() for batch in strayed))

    def test_memory_clips_increase_and_end_consecutive(self):
        walk = self.pool.paths(1, 1280, overworld.EXPLORE, True)[0]
        rng = np.random.default_rng(1)
        spans = []
        for _ in range(50):
            times = clips.memory_times(walk, 128, rng)
            self.assertEqual(len(times), 128)
            self.assertTrue((np.diff(times) > 0).all())
            self.assertTrue((np.diff(times[64:]) == 1).all())
            spans.append(times[-1] - times[0])
        self.assertGreater(max(spans), 900)

    def test_pieces_of_a_clip_stand_beside_its_walk(self):
        moves = clips.moves_aside(400, 32, 8, np.random.default_rng(2))
        self.assertEqual({int(v) for v in moves.ravel() % 16}, {0, 4, 8, 12})
        self.assertTrue((moves.reshape(400, 4, 8, 2) == moves.reshape(400, 4, 8, 2)[:, :, :1]).all())
        self.assertAlmostEqual((moves == 0).all((1, 2)).mean(), 1 - clips.MOVED_SHARE, delta=0.08)
        batch = clips.make_batch("memory", 1, overworld.Pool(9, 1), np.random.default_rng(3), 384, pin=False)
        self.assertEqual(batch.pixels.shape, (1, 128, 128, 256, 3))

    def test_psnr_counts_masked_pixels_alone(self):
        a = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
        b, mask = a.clone(), torch.zeros(1, 4, 4)
        b[0, 0, 0], mask[0, 1:] = 255, 1
        self.assertGreater(evaluate.frame_psnr(a, b, mask).item(), 70)
        self.assertAlmostEqual(evaluate.frame_psnr(a, b).item(), 10 * np.log10(16), places=3)

    def test_truth_returns_to_itself(self):
        """The measure aligns places: what stands still agrees exactly, at shifted poses too."""
        maps = evaluate.Maps(5, 1, 384, 1)
        for off_phase in (False, True):
            xy = np.stack([evaluate.there_and_back(0, maps.info[0]["start"], 180, off_phase)])
            still = np.empty((1, 180, 128, 256, 3), np.uint8)
            world = np.random.default_rng(0).integers(0, 255, (overworld.TORUS, overworld.TORUS, 3), np.uint8)
            for f, (x, y) in enumerate(xy[0]):
                rows, columns = (y + np.arange(128)) % overworld.TORUS, (x + np.arange(256)) % overworld.TORUS
                still[0, f] = world[np.ix_(rows, columns)]
            value, pairs = evaluate.return_psnr(torch.from_numpy(still), xy, lag=30)
            self.assertGreater(pairs, 0)
            self.assertGreater(value, 70)


class CheckpointTest(unittest.TestCase):
    def test_parts_come_back(self):
        model = tiny_model()
        with tempfile.TemporaryDirectory() as folder:
            whole, checkpoint.PART_BYTES = checkpoint.PART_BYTES, 300_000
            try:
                out = Path(folder, "ema")
                checkpoint.save_parts(out, model.config, make_tiny.WORDS, model.state_dict(), "bf16")
            finally:
                checkpoint.PART_BYTES = whole
            self.assertGreater(len(list(out.glob("part*"))), 1)
            state = checkpoint.load_weights(folder)
            self.assertEqual(checkpoint.load_config(folder), model.config)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-2, atol=1e-3)


class ReferenceTest(unittest.TestCase):
    def test_writes_every_layer(self):
        with tempfile.TemporaryDirectory() as folder:
            config = m.tiny_config(len(make_tiny.WORDS))
            config.sampler = m.SamplerConfig("renoise", 2, first_steps=3)
            m.save_model(folder, config, tiny_model().state_dict(), make_tiny.WORDS)
            with torch.inference_mode():
                out = reference.run(folder, "a red tower .", 2, 7, (1400, 1480), (8, 4))
        self.assertEqual(out["frame1.step2.blocks.1"].shape, (128, 64))
        self.assertEqual(out["frame1.pixels"].shape, (3, 128, 256))
        self.assertIn("frame1.step1.noise", out)
        self.assertIn("frame0.step3.head", out)
        self.assertNotIn("frame1.step3.head", out)
        self.assertTrue(all(value.isfinite().all() for value in out.values()))


if __name__ == "__main__":
    unittest.main()
