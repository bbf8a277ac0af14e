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
from transformer_stage import Mask


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
            config.sampler.num_steps, config.sampler.type = 2, "renoise"
            m.save_model(folder, config, tiny_model().state_dict(), make_tiny.WORDS)
            with torch.inference_mode():
                out = reference.run(folder, "a red tower .", 2, 7, (1400, 1480), (8, 4))
        self.assertEqual(out["frame1.step2.blocks.1"].shape, (128, 64))
        self.assertEqual(out["frame1.pixels"].shape, (3, 128, 256))
        self.assertIn("frame1.step1.noise", out)
        self.assertTrue(all(value.isfinite().all() for value in out.values()))


if __name__ == "__main__":
    unittest.main()
