"""What the embedded data set sounds like: parametric sources, and ten scenes made of them.

A recording is 10 s of a scene at one location: some of the scene's sources, each at its own level, in the room of that
location. Everything is drawn from generators seeded by names, so a recording sounds the same whatever else is generated
and in whatever order.

The audio only has to exercise the toolkit: it can be learned, is not trivial, and depends on the microphone. It
does not imitate any published recording.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from datasets.synthetic.signals import (
    N_SAMPLES,
    RECORDING_SECONDS,
    SAMPLE_RATE,
    curve,
    decay,
    filtered,
    log_uniform,
    named_rng,
    noise,
    per_bin,
    scatter,
    silence,
    spectrum_of,
    swell,
    tone,
    wander,
)

# ---- sources: (generator of the recording, pitch factor of the location) -> (sample,), any level --------------------


def ventilation(rng: Generator, pitch: float) -> ndarray:
    """Air noise and the blade tone of a fan."""
    air = noise(rng, (40, 0), (200, rng.uniform(-8, 2)), (2000, rng.uniform(-20, -8)), (12000, rng.uniform(-45, -25)))
    fan = tone(np.full(N_SAMPLES, 110 * pitch * rng.uniform(0.7, 1.4)), 0.6 ** np.arange(8))
    return air / air.std() + rng.uniform(0, 0.5) * fan


def traffic(rng: Generator, pitch: float) -> ndarray:
    """Distant rumble; vehicles passing by with tyre noise that rises and falls."""
    rumble = noise(rng, (30, -2), (80, 0), (500, -12), (2000, -26), (10000, -50)) * swell(rng, 0.7, 2)
    tyres = noise(rng, (60, -12), (900 * pitch, 0), (2000, -3), (5000, -18), (14000, -36))
    t = np.linspace(0, RECORDING_SECONDS, N_SAMPLES, dtype=np.float32)
    passing = silence()
    for centre in rng.uniform(-1, RECORDING_SECONDS + 1, rng.integers(1, 5)):
        passing += rng.uniform(0.3, 1) / (1 + ((t - centre) / rng.uniform(0.4, 1.6)) ** 2)
    return rumble / rumble.std() + rng.uniform(1.0, 2.2) * passing * tyres / tyres.std()


def engine(rng: Generator, pitch: float) -> ndarray:
    """Diesel engine heard from inside: firing harmonics that follow the revolutions, and body rattle."""
    revs = 32 * pitch * rng.uniform(0.75, 1.7) * np.exp(wander(rng, 0.5, 0.1))
    firing = tone(revs, rng.uniform(0.3, 1, 24) * 0.86 ** np.arange(24))
    body = noise(rng, (30, 0), (120, -2), (600, -16), (3000, -32), (12000, -55)) * swell(rng, 1, 2)
    return firing + rng.uniform(0.3, 1.0) * body * (firing.std() / body.std())


def rail(rng: Generator, pitch: float) -> ndarray:
    """Wheels rolling on rails: broad noise that follows the speed, and joints or points in bursts."""
    speed = np.clip(1 + wander(rng, 0.3, 0.35), 0.15, 2)
    roll = noise(rng, (35, -6), (120, -1), (350 * pitch, 0), (1100, -14), (4000, -28), (14000, -50)) * speed
    roll /= roll.std()
    knock = noise(rng, (60, -6), (250, 0), (1500, -10), (8000, -35))
    knock *= 2.5 / knock.std()
    shape = decay(0.04, 0.25)
    gap = rng.uniform(0.5, 1.4)
    at = np.arange(rng.uniform(0, gap), RECORDING_SECONDS, gap)
    gate = scatter(silence(), np.concatenate([at, at + 0.12]), lambda: shape * rng.uniform(0.3, 1))
    return roll + rng.uniform(0.4, 1.2) * knock * gate


def squeal(rng: Generator, pitch: float) -> ndarray:
    """Wheel flanges singing in a bend."""
    hz = 2600 * pitch * rng.uniform(0.6, 1.8) * np.exp(wander(rng, 3, 0.02))
    return tone(hz, np.array([1, 0.4, 0.2])) * np.maximum(wander(rng, 0.6, 1), 0)


def whine(rng: Generator, pitch: float) -> ndarray:
    """Electric traction motor: tones that climb and fall with the speed."""
    hz = 420 * pitch * rng.uniform(0.6, 1.7) * np.exp(wander(rng, 0.3, 0.3))
    return tone(hz, np.array([1, 0.5, 0.1, 0.35, 0.05, 0.2])) * swell(rng, 0.8, 4)


def _voice(rng: Generator, base_hz: float) -> ndarray:
    """Glottal pulses with a moving pitch, gated into syllables."""
    hz = base_hz * np.exp(wander(rng, 2.5, 0.12))
    syllables = np.maximum(wander(rng, rng.uniform(7, 10), 1), 0) * (wander(rng, 0.6, 1) > rng.uniform(-1.2, 0))
    return tone(hz, 0.88 ** np.arange(24)) * syllables


def babble(rng: Generator, pitch: float) -> ndarray:
    """A few voices nearby over the murmur of many."""
    far = noise(rng, (100, -12), (250, -2), (550, 0), (1500, -8), (3500, -17), (9000, -40)) * swell(rng, 5, 3)
    near = silence()
    for _ in range(rng.integers(1, 3)):
        near += rng.uniform(0.3, 1) * _voice(rng, log_uniform(rng, 95, 250))
    first, second = rng.uniform(350, 800), rng.uniform(1000, 2300)  # formants, Hz
    near = filtered(
        near, (80, -12), (first, 0), (0.5 * (first + second), -14), (second, -5), (3200, -14), (5000, -32), (9000, -50)
    )
    return far / far.std() + rng.uniform(0, 1.5) * near / max(float(near.std()), 1e-6)


def announcement(rng: Generator, pitch: float) -> ndarray:
    """Chime and a voice through a narrow loudspeaker."""
    start = rng.uniform(-3, 6)
    chime_hz = 520 * rng.uniform(0.8, 1.3) * np.array([1, 1.26, 1.5])
    t = np.arange(int(0.6 * SAMPLE_RATE)) / SAMPLE_RATE
    out = silence()
    for i, hz in enumerate(chime_hz):
        scatter(out, np.array([start + 0.45 * i]), lambda hz=hz: np.sin(2 * np.pi * hz * t) * decay(0.2, 0.6))
    speech = _voice(rng, log_uniform(rng, 110, 230))
    speech[: max(0, int((start + 1.6) * SAMPLE_RATE))] = 0
    return filtered(out + speech, (150, -40), (450, -4), (1000, 0), (2500, -3), (3800, -12), (6000, -45))


def footsteps(rng: Generator, pitch: float) -> ndarray:
    """One to three walkers; the floor decides how bright a step is."""
    bright = rng.uniform(800, 3500) * pitch
    thump = noise(rng, (60, -10), (150, 0), (bright, -4), (2.5 * bright, -20), (16000, -45))
    shape = decay(rng.uniform(0.008, 0.03), 0.15)
    gate = silence()
    for _ in range(rng.integers(1, 4)):
        gap = rng.uniform(0.45, 0.7)
        at = np.arange(rng.uniform(0, gap), RECORDING_SECONDS, gap)
        loud = rng.uniform(0.2, 1)
        scatter(gate, at + rng.normal(0, 0.02, len(at)), lambda loud=loud: loud * rng.uniform(0.5, 1) * shape)
    return thump * gate * swell(rng, 0.5, 4)


def trolley(rng: Generator, pitch: float) -> ndarray:
    """Suitcase wheels rattling over tiles, coming and going."""
    tiles = noise(rng, (120, -10), (700 * pitch, 0), (2500, -3), (7000, -15), (16000, -40))
    hz = rng.uniform(9, 22) * np.exp(wander(rng, 1, 0.1))
    rattle = 0.35 + np.maximum(tone(hz, np.array([1, 0.5])), 0) ** 2
    return tiles * rattle * np.maximum(wander(rng, 0.4, 0.8) + rng.uniform(0.5, 1.2), 0)


def clatter(rng: Generator, pitch: float) -> ndarray:
    """Cups, cutlery, coat hangers: short bright ringing."""

    def ring() -> ndarray:
        t = np.arange(int(0.12 * SAMPLE_RATE)) / SAMPLE_RATE
        hz = rng.uniform(1800, 6500, 3) * pitch
        return rng.uniform(0.2, 1) * np.sin(2 * np.pi * hz[:, None] * t).sum(axis=0) * decay(0.025, 0.12)

    return scatter(silence(), rng.uniform(0, RECORDING_SECONDS, rng.integers(4, 25)), ring)


def music(rng: Generator, pitch: float) -> ndarray:
    """Chords and a beat from a loudspeaker."""
    beat = rng.uniform(0.4, 0.7)
    n_chords = int(RECORDING_SECONDS / (4 * beat)) + 2
    out = silence()
    for semitones in (0, rng.choice([3, 4]), 7):
        roots = rng.choice([-5, -3, 0, 2, 4], n_chords).repeat(int(4 * beat * SAMPLE_RATE))[:N_SAMPLES]
        out += tone(220 * pitch * 2 ** ((roots + semitones) / 12), 0.6 ** np.arange(6))
    kick = np.sin(2 * np.pi * 70 * np.arange(int(0.15 * SAMPLE_RATE)) / SAMPLE_RATE) * decay(0.05, 0.15)
    out = scatter(out, np.arange(0, RECORDING_SECONDS, beat), lambda: 4 * kick)
    return filtered(out, (60, -15), (150, 0), (3000, -3), (8000, -20), (16000, -50))


def beeps(rng: Generator, pitch: float) -> ndarray:
    """Door signal: a row of beeps, then the hiss and thump of the doors."""
    start, gap = rng.uniform(-1, 8), rng.uniform(0.15, 0.4)
    t = np.arange(int(0.6 * gap * SAMPLE_RATE)) / SAMPLE_RATE
    beep = np.sign(np.sin(2 * np.pi * 1300 * pitch * rng.uniform(0.7, 1.7) * t))
    n_beeps = int(rng.integers(4, 10))
    out = scatter(silence(), start + gap * np.arange(n_beeps), lambda: beep)
    hiss = decay(0.3, 1.2) * rng.standard_normal(int(1.2 * SAMPLE_RATE), dtype=np.float32)
    return scatter(out, np.array([start + gap * n_beeps]), lambda: 0.7 * hiss)


def bell(rng: Generator, pitch: float) -> ndarray:
    """Struck bell: inharmonic partials that ring on."""
    partials = 700 * pitch * rng.uniform(0.5, 1.6) * np.array([1, 2.0, 2.4, 3.0, 4.5])
    t = np.arange(int(1.5 * SAMPLE_RATE)) / SAMPLE_RATE
    sound = (np.sin(2 * np.pi * partials[:, None] * t) / np.arange(1, 6)[:, None]).sum(axis=0) * decay(0.4, 1.5)
    at = rng.uniform(-1, 7) + rng.uniform(0.3, 1.2) * np.arange(rng.integers(2, 7))
    return scatter(silence(), at, lambda: sound)


def wind(rng: Generator, pitch: float) -> ndarray:
    """Gusts on the microphone and in leaves."""
    gusts = swell(rng, 1.5, 5)
    low = noise(rng, (20, 0), (60, -3), (200, -18), (800, -40), (16000, -75)) * gusts
    leaves = noise(rng, (300, -20), (2500, 0), (6000, -4), (14000, -18)) * gusts
    return low / low.std() + rng.uniform(0, 0.4) * leaves / leaves.std()


def water(rng: Generator, pitch: float) -> ndarray:
    """Fountain or stream."""
    return noise(rng, (150, -25), (600 * pitch, -6), (2500, 0), (7000, -6), (16000, -22)) * swell(rng, 3, 1)


def birds(rng: Generator, pitch: float) -> ndarray:
    """Chirps: short whistles with a bend, in phrases."""

    def phrase() -> ndarray:
        t = np.arange(int(0.12 * SAMPLE_RATE)) / SAMPLE_RATE
        base, bend = rng.uniform(2500, 6000) * pitch, rng.uniform(-9000, 9000)
        chirp = np.sin(2 * np.pi * (base * t + 0.5 * bend * t**2)) * np.sin(np.pi * t / t[-1]) ** 2
        return rng.uniform(0.2, 1) * np.tile(chirp, rng.integers(1, 6))

    return scatter(silence(), rng.uniform(-0.3, RECORDING_SECONDS, rng.integers(3, 16)), phrase)


# ---- scenes ----------------------------------------------------------------------------------------------------------

# source: (probability at a location, lowest, highest level in dB); the first one is in every recording of the scene.
# Ranges overlap and every source occurs in several scenes on purpose: none gives a scene away.
Recipe = dict[Callable[[Generator, float], ndarray], tuple[float, float, float]]

SCENE_SOURCES: dict[str, Recipe] = {
    "airport": {
        trolley: (1.0, -2, 3), ventilation: (0.95, -9, -3), babble: (0.95, -10, -4), announcement: (0.7, -4, 3),
        footsteps: (0.4, -10, -2), clatter: (0.15, -14, -6), music: (0.05, -12, -6),
    },
    "bus": {
        engine: (1.0, -1, 4), ventilation: (0.5, -12, -4), babble: (0.5, -12, -2), traffic: (0.4, -12, -4),
        beeps: (0.25, -10, -2), announcement: (0.1, -12, -2), clatter: (0.15, -16, -8),
    },
    "metro": {
        rail: (1.0, -1, 4), whine: (0.35, -16, -6), ventilation: (0.8, -8, -2), babble: (0.4, -14, -4),
        squeal: (0.25, -12, -4), beeps: (0.25, -8, 0), announcement: (0.2, -8, 0),
    },
    "metro_station": {
        ventilation: (1.0, -5, 0), rail: (0.6, -8, 0), beeps: (0.6, -5, 2), babble: (0.6, -12, -4),
        footsteps: (0.7, -6, 2), announcement: (0.3, -6, 2), squeal: (0.25, -10, -2), trolley: (0.1, -12, -4),
    },
    "park": {
        wind: (1.0, -4, 1), birds: (0.9, -6, 3), traffic: (0.5, -14, -6), footsteps: (0.3, -14, -6),
        babble: (0.3, -14, -6), water: (0.15, -14, -4), bell: (0.05, -12, -4),
    },
    "public_square": {
        water: (1.0, -5, 1), babble: (0.95, -8, -2), traffic: (0.7, -10, -3), bell: (0.5, -6, 2), birds: (0.4, -8, 0),
        wind: (0.4, -10, -4), footsteps: (0.4, -12, -4), music: (0.15, -12, -4),
    },
    "shopping_mall": {
        babble: (1.0, -2, 3), music: (0.75, -6, 1), clatter: (0.75, -8, 0), ventilation: (0.7, -10, -4),
        footsteps: (0.5, -10, -2), announcement: (0.1, -8, -2), trolley: (0.1, -12, -4),
    },
    "street_pedestrian": {
        footsteps: (1.0, -2, 4), babble: (0.95, -5, 1), traffic: (0.5, -12, -5), music: (0.15, -10, -4),
        clatter: (0.2, -14, -6), wind: (0.3, -10, -4), birds: (0.1, -12, -4),
    },
    "street_traffic": {
        traffic: (1.0, 0, 4), engine: (0.4, -12, -4), wind: (0.4, -10, -2), footsteps: (0.3, -12, -4),
        babble: (0.2, -14, -6), birds: (0.1, -14, -6), bell: (0.05, -12, -4),
    },
    "tram": {
        whine: (1.0, -3, 3), rail: (0.9, -6, 0), squeal: (0.5, -8, 1), bell: (0.35, -8, 1), babble: (0.5, -12, -2),
        ventilation: (0.4, -12, -4), traffic: (0.3, -12, -4), beeps: (0.15, -10, -2),
    },
}  # fmt: skip
ROOM_SECONDS = {  # range of decay times; scenes not named are outdoors or in a small cabin and stay dry
    "airport": (0.15, 0.35),
    "metro_station": (0.2, 0.45),
    "shopping_mall": (0.1, 0.3),
}


def render_scene(seed: int, scene: str, location: str, recording: str) -> ndarray:
    """One 10 s recording at a perfect microphone, as its spectrum.

    Args:
        seed: seed of the data set.
        scene: key of `SCENE_SOURCES`.
        location: name of the place; decides which sources there are, their usual level, pitch, colour and room.
        recording: name of the recording; decides everything else.

    Returns:
        (bin,) complex64, `numpy.fft.rfft` of the waveform.
    """
    place, rng = named_rng(seed, "location", location), named_rng(seed, "recording", recording)
    pitch = float(np.exp(place.normal(0, 0.08)))
    colour_db = curve((20, place.normal(0, 3)), (200, 0), (1500, place.normal(0, 1.2)), (12000, place.normal(0, 2.5)))
    recipe = [
        (source, p > place.random(), place.uniform(low, high))
        for source, (p, low, high) in SCENE_SOURCES[scene].items()
    ]
    decay_seconds = place.uniform(*ROOM_SECONDS[scene]) if scene in ROOM_SECONDS else 0.0
    loudness_db = place.normal(-27, 3) + rng.normal(0, 2)

    x = noise(rng, (20, 0), (20000, -20))
    x *= 10 ** (-40 / 20) / x.std()  # 40 dB below a source at 0 dB: a scene is never quite silent
    for i, (source, is_here, level_db) in enumerate(recipe):
        if i == 0 or (is_here and rng.random() < 0.9):
            sound = source(rng, pitch)
            loudest = np.sqrt(np.square(sound).reshape(RECORDING_SECONDS, -1).mean(axis=1).max())
            x += 10 ** ((level_db + rng.normal(0, 1.5)) / 20) / max(float(loudest), 1e-6) * sound
    spectrum = spectrum_of(x) * per_bin(colour_db)
    if decay_seconds:
        tail = rng.standard_normal(SAMPLE_RATE, dtype=np.float32) * decay(decay_seconds, 1.0)
        tail *= place.uniform(0.5, 1.2) / np.sqrt(np.square(tail).sum())
        spectrum *= 1 + spectrum_of(tail)
    return spectrum * np.float32(10 ** (loudness_db / 20))
