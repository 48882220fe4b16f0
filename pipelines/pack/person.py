"""A person: torso, head and limbs, with COCO's 17 keypoints, inside the circle of radius 1."""

from __future__ import annotations

import math

import numpy as np

from pipelines.pack.placed import Points

COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
    "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip
# Pairs of keypoints, counted from 1 as COCO does.
COCO_SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip


def person(rng: np.random.Generator) -> tuple[list[Points], Points]:
    """Polygons (torso, head, limbs) and the COCO keypoints (17, 2) of a person.

    The person faces the viewer, so the person's left is at the viewer's right.
    """
    keypoints = np.zeros((17, 2))
    keypoints[0] = 0.0, -0.72
    keypoints[1:5] = [[0.07, -0.78], [-0.07, -0.78], [0.14, -0.75], [-0.14, -0.75]]
    # Angles are from straight down, outwards. Chance bends arms and legs, and no other part.
    for side, sign in ((0, 1.0), (1, -1.0)):
        shoulder = np.array([sign * 0.24, -0.48])
        hip = np.array([sign * 0.14, 0.1])
        upper, fore = sign * rng.uniform(0.1, 1.6), sign * rng.uniform(-0.4, 1.8)
        thigh, shin = sign * rng.uniform(-0.05, 0.5), sign * rng.uniform(-0.3, 0.3)
        elbow = shoulder + 0.29 * _down(upper)
        knee = hip + 0.42 * _down(thigh)
        keypoints[[5 + side, 7 + side, 9 + side]] = shoulder, elbow, elbow + 0.27 * _down(fore)
        keypoints[[11 + side, 13 + side, 15 + side]] = hip, knee, knee + 0.4 * _down(shin)
    angles = np.linspace(0, 2 * math.pi, 17)[:-1]
    head = np.array([0.0, -0.75]) + 0.18 * np.stack([np.cos(angles), np.sin(angles)], 1)
    torso = np.array([[0.27, -0.54], [0.17, 0.16], [-0.17, 0.16], [-0.27, -0.54]])
    limbs = [(5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16)]
    return [torso, head, *(_bar(keypoints[a], keypoints[b], 0.075) for a, b in limbs)], keypoints


def _down(angle: float) -> Points:
    return np.array([math.sin(angle), math.cos(angle)])


def _bar(start: Points, end: Points, half_width: float) -> Points:
    along = (end - start) / np.hypot(*(end - start))
    across = half_width * np.array([-along[1], along[0]])
    over = half_width * along
    # A little longer than the limb, so that neighbouring limbs meet without a gap.
    return np.array(
        [start - over + across, end + over + across, end + over - across, start - over - across]
    )
