"""Hand-written phrasings of each action (``phrases.txt``), and what stands around and between them.

``T``, ``V``, ``E``: the split that a phrasing belongs to (training, validation, test). A slot in braces is filled by
``values.py`` and gives an argument. After ``|`` stand arguments that the words imply. A line with ``!`` is no imperative, so no
polite frame is put around it.
"""

from pathlib import Path

PHRASES = (Path(__file__).parent / "phrases.txt").read_text(encoding="utf-8")

FRAMES = {
    ("en", "train"): [
        "please {}",
        "{} please",
        "could you {}?",
        "hey, {}",
        "now {}",
        "ok, {}",
        "{} for me",
        "buddy, {}",
        "can you please {}?",
        "I need you to {}",
        "just {}",
        "let me see you {}",
        "quick, {}",
        "robot, {}",
        "it is time to {}",
        "try to {}",
        "{} right away",
        "{}, thanks",
    ],
    ("en", "validation"): ["can you {}?", "I want you to {}", "{} now"],
    ("en", "test"): ["would you {}?", "go ahead and {}", "I'd like you to {}", "{}, will you", "be a good dog and {}"],
    ("zh", "train"): [
        *("请{}", "{}吧", "帮我{}", "现在{}", "来，{}", "小狗，{}", "请你{}"),
        *("快{}", "你{}", "马上{}", "可以{}吗？", "请帮忙{}", "我想让你{}", "{}，快点"),
    ],
    ("zh", "validation"): ["麻烦{}", "{}好吗"],
    ("zh", "test"): ["能不能{}", "拜托{}", "狗狗，{}", "{}，谢谢", "我要你{}"],
}
JOINS = {
    ("en", "train"): [
        "{a}, then {b}",
        "{a} and then {b}",
        "first {a}, then {b}",
        "{a}. After that {b}",
        "before you {b}, {a}",
        "{b} after you {a}",
        "{a}. Then {b}",
        "{a}; then {b}",
        "{a} before you {b}",
        "after you {a}, {b}",
        "{a} and when you are done {b}",
        "{a}, followed by this: {b}",
        "two things: {a}, {b}",
        "{a}. Now {b}",
        "{a}, and {b} once that is done",
    ],
    ("en", "validation"): ["{a}, and after that {b}", "{a}, then you {b}"],
    ("en", "test"): [
        "{a} and {b}",
        "{a}, next {b}",
        "{a} and afterwards {b}",
        "start off: {a}, then {b}",
        "{b}, but first {a}",
    ],
    ("zh", "train"): [
        *("先{a}，再{b}", "{a}，然后{b}", "{a}，接着{b}", "{a}，再{b}", "{b}之前先{a}"),
        *("{a}后再{b}", "{a}，完了{b}", "{a}。然后{b}", "{a}，做完后{b}", "{a}，接下来{b}", "{a}，再去{b}", "两件事：{a}，{b}"),
    ],
    ("zh", "validation"): ["{a}，之后{b}", "首先{a}，再{b}"],
    ("zh", "test"): ["{a}，随后{b}", "先{a}，然后{b}", "{a}，最后{b}", "第一{a}，第二{b}"],
}
