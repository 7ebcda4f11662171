"""The skills of the robot dog, what each one means, and the sizes of the data set's splits."""

from __future__ import annotations

MEANINGS: dict[str, str] = {
    "Damp": "motors go limp: soft damping, no torque in the joints",
    "BalanceStand": "stay standing, steady and level, and hold the balance",
    "StopMove": "stop whatever is moving and hold still",
    "StandUp": "get on the feet from lying, or choose standing over lying or sitting",
    "StandDown": "lie down, lower the body to the floor",
    "RecoveryStand": "get back up after a fall",
    "Sit": "sit down on the haunches",
    "RiseSit": "end a sit: rise from the sitting pose",
    "Stretch": "stretch the body and legs",
    "Wallow": "roll over, roll around on the ground",
    "Scrape": "bow with the front paws together, scraping the air",
    "FrontFlip": "front flip, forward somersault",
    "FrontJump": "jump or leap forward",
    "FrontPounce": "pounce or lunge forward, as on prey",
    "WiggleHips": "wiggle the hips or the bottom only",
    "TurnLeft": "turn to the left",
    "TurnRight": "turn to the right",
    "SayHello": "greet somebody: wave, say hi",
    "Dance": "dance, with no style named",
    "DrawHeart": "draw or show a heart",
    "BalanceAttitude": "lean or tilt the body and hold the pose",
    "PlayKungFu": "kung fu or martial arts moves",
    "HappyBirthday": "wish somebody a happy birthday",
    "HappyNewYear": "wish a happy New Year, give a New Year greeting",
    "CheerLeading": "cheer for a team or a person",
    "ShakeBody": "shake the whole body, as a wet dog does",
    "TurnAround": "turn the whole body round: about-face or a full spin",
    "LionDance": "the Chinese lion dance",
    "Welcome": "welcome guests, visitors or customers who arrive",
    "WaltzDance": "dance a waltz",
    "ChaChaDance": "dance a cha-cha",
    "Tango": "dance a tango",
    "HipHopDance": "hip-hop, street dance or breakdance",
    "Bark": "bark, say woof",
}

SKILLS: tuple[str, ...] = tuple(MEANINGS)

SPLITS: dict[str, dict[str, int | str]] = {
    "train_normal": {"size": 3400, "en": 2074, "zh": 1326, "kind": "skill"},
    "train_remote_base": {"size": 1000, "en": 541, "zh": 459, "kind": "remote"},
    "train_remote_shadow": {"size": 47, "en": 21, "zh": 26, "kind": "remote"},
    "validation_normal": {"size": 204, "en": 120, "zh": 84, "kind": "skill"},
    "validation_remote": {"size": 60, "en": 33, "zh": 27, "kind": "remote"},
    "test_normal": {"size": 306, "en": 170, "zh": 136, "kind": "skill"},
    "test_remote": {"size": 18, "en": 10, "zh": 8, "kind": "remote"},
    "test_remote_large": {"size": 320, "en": 180, "zh": 140, "kind": "remote"},
    "train_oos": {"size": 750, "en": 420, "zh": 330, "kind": "oos"},
    "validation_oos": {"size": 118, "en": 66, "zh": 52, "kind": "oos"},
    "test_oos": {"size": 196, "en": 117, "zh": 79, "kind": "oos"},
    "calibration_normal": {"size": 510, "en": 283, "zh": 227, "kind": "skill"},
    "calibration_remote": {"size": 530, "en": 300, "zh": 230, "kind": "remote"},
    "calibration_oos": {"size": 325, "en": 195, "zh": 130, "kind": "oos"},
}
