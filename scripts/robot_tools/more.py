"""Further training phrasings, for the larger training set (``robot_tools_large``).

They were written without sight of the validation and test phrasings; the few that were those of a validation or test row by
chance were taken out (``tests/unit/test_tools.py`` compares them).
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MORE_PHRASES = (FOLDER / "more_phrases.txt").read_text(encoding="utf-8")
MORE_CLOUD = (FOLDER / "more_cloud.txt").read_text(encoding="utf-8")
MORE_FRAMES = {
    "en": [
        "would you please {}?",
        "be a dear and {}",
        "be so kind as to {}",
        "would you be so kind as to {}?",
        "I would love it if you could {}",
        "it would be great if you could {}",
        "do me a favour and {}",
        "do me a favour: {}",
        "come on, {}",
        "listen, {}",
        "right, {}",
        "alright, {}",
        "well, {}",
        "so, {}",
        "{}, if you please",
        "{} if you can",
        "{}, boy",
        "{}, there's a good dog",
        "why don't you {}?",
        "how about you {}?",
        "you should {}",
        "you may {} now",
        "make sure you {}",
        "don't forget to {}",
        "kindly {}",
        "pretty please, {}",
        "my dear, {}",
        "doggy, {}",
        "puppy, can you {}?",
        "excuse me, could you {}?",
        "I was wondering if you could {}",
        "your job now is to {}",
        "I'm asking you to {}",
        "next task: {}",
        "go on, {}",
        "do you think you could {}?",
    ],
    "zh": [
        *("麻烦你{}", "麻烦您{}", "劳驾{}", "能{}吗？", "你能{}吗？", "可不可以{}？", "{}，好不好？", "{}行不行？", "{}，乖"),
        *("乖，{}", "听话，{}", "机器狗，{}", "宝贝，{}", "喂，{}", "好了，{}", "去，{}", "来来来，{}", "听我说，{}"),
        *("赶紧{}", "赶快{}", "立刻{}", "那就{}", "该{}了", "轮到你{}了", "我希望你{}", "现在请你{}", "你的任务是{}"),
        *("不好意思，{}", "你试着{}", "你给我{}"),
    ],
}
MORE_JOINS = {
    "en": [
        "{a}. {b}",
        "{a}, {b}",
        "{a}; {b}",
        "{a}, afterwards {b}",
        "{a}. Afterwards, {b}",
        "{a}, and finally {b}",
        "{a}, and as soon as you have finished, {b}",
        "{a}. When you have finished, {b}",
        "{a}. Once that's done, {b}",
        "{a} and only then {b}",
        "start like this: {a}. Then {b}",
        "to begin with, {a}. To finish, {b}",
        "step one: {a}. Step two: {b}",
        "one: {a}. Two: {b}",
        "1. {a} 2. {b}",
        "both in this order: {a}, {b}",
        "{a}, {b}, in that order",
        "do this first: {a}. Do this second: {b}",
        "firstly {a}, secondly {b}",
        "{b}, but before that {a}",
        "{b} once you {a}",
        "{b} as soon as you {a}",
        "{b}, but only after you {a}",
        "once you {a}, {b}",
        "as soon as you {a}, {b}",
        "last of all {b}, first of all {a}",
        "{a}, later {b}",
        "{a}, and then I'd like you to {b}",
        "{a}, and your next job is this: {b}",
    ],
    "zh": [
        *("{a}，{b}", "{a}。{b}", "{a}；{b}", "{a}，紧接着{b}", "{a}，然后再{b}", "{a}，做好了就{b}"),
        *("{a}，弄完了再{b}", "{a}。做完以后，{b}", "{a}以后再{b}", "等你{a}之后，{b}", "首先{a}，其次{b}"),
        *("先{a}，后{b}", "先{a}，完事了{b}", "第一步{a}，第二步{b}", "一是{a}，二是{b}，按顺序来", "按顺序做：{a}，{b}"),
        *("依次完成：{a}；{b}", "{a}，{b}，按这个顺序", "开头{a}，末尾{b}", "{b}，不过要先{a}", "{b}，但在这之前先{a}"),
        *("{b}之前，你得{a}", "在{b}以前，{a}", "后做这个：{b}；先做这个：{a}", "我要你先{a}，再{b}", "你{a}，再接着{b}"),
    ],
}
