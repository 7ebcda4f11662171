"""Hand-written phrasings of each action. T, V, E: the split that a phrasing belongs to (training, validation, test).

A slot in braces is filled by ``values.py`` and gives an argument. After ``|`` stand arguments that the words imply. A line with
``!`` is no imperative, so no polite frame is put around it.
"""

PHRASES = """
# Walk en
T walk {dir} {dist}
T walk {dir}
T go {dir} {dist} {speed}
T move {dir} by {dist}
T take a walk {dir} for {dist}
T {speed} walk {dist} {dir}
T step {dir} {dist}
T come {dist} closer | direction=forward
T back up {dist} | direction=backward
T walk {speed} {dir}
T back off | direction=backward
T go {dist} {dir}
T! I need you {dist} further {dir}
V head {dir} for {dist}
V move {dist} {dir} {speed}
V advance {dist} | direction=forward
E go straight on for {dist} | direction=forward
E shift {dir} {dist}
E retreat {dist} {speed} | direction=backward
E walk {dir} {speed} for {dist}
# Walk zh
T {dir}走{dist}
T {dir}走
T {speed}{dir}走{dist}
T {dir}移动{dist}
T 前进{dist} | direction=forward
T 后退{dist} | direction=backward
T 倒着走{dist} | direction=backward
T {dir}挪{dist}
T 走近{dist} | direction=forward
T {speed}{dir}走
V {dir}迈{dist}
V {dir}行进{dist}
V {speed}前进{dist} | direction=forward
E 退{dist} | direction=backward
E {dir}再走{dist}
E {speed}{dir}移动{dist}
E 直走{dist} | direction=forward
# Turn en
T turn {side} {deg}
T turn {side}
T turn {deg} to the {side}
T rotate {deg} to the {side}
T make a {side} turn
T turn to the {side} by {deg}
T face {side}
T twist {side} {deg}
T swing {deg} {side}
V pivot {side} by {deg}
V rotate {side} {deg}
E swivel {deg} to the {side}
E turn yourself {side} by {deg}
E go {deg} round to the {side}
E take a {side}
# Turn zh
T 向{side}转{deg}
T 往{side}转
T {side}转{deg}
T 朝{side}边转{deg}
T 往{side}边转过去
T {side}转
T 转{deg}，往{side}
V 向{side}旋转{deg}
V 往{side}拐{deg}
E 身体向{side}转{deg}
E 朝{side}拐
E 往{side}边扭{deg}
# Spin en
T spin {times}
T spin around {times}
T spin {times} to the {side}
T twirl {times}
T do {n} full spins
T whirl round {times}, {side}
T turn in circles {times}
T spin
V rotate on the spot {times}
V do {n} complete circles
E spin on the spot {times}
E go round in a circle {times}
E do {n} twirls
# Spin zh
T 转{n}圈
T 原地转{n}圈
T 原地打转
T 向{side}转{n}圈
T 打{n}个转
T 绕着自己转{n}圈
V 在原地旋转{n}圈
V 转上{n}圈
E 原地旋转{n}圈
E 往{side}连转{n}圈
E 转{n}个圈
# Jump en
T jump {times}
T jump
T jump up and down {times}
T hop {times}
T do {n} jumps
T leap into the air {times}
T give me {n} hops
V bounce {times}
V jump {times} in a row
E hop up {times}
E do {n} little jumps
E spring up {times}
# Jump zh
T 跳{n}下
T 跳{n}次
T 跳一跳
T 连跳{n}下
T 蹦{n}下
T 原地跳{n}次
V 蹦跶{n}下
V 往上跳{n}次
E 连续跳{n}次
E 蹦起来{n}次
E 跳起{n}下
# Sit en
T sit down for {sec}
T sit
T sit down
T have a seat
T stay seated for {sec}
T sit still for {sec}
T take a seat for {sec}
T park your bottom for {sec}
V sit there for {sec}
V plant yourself on the floor
E remain sitting for {sec}
E sit on your haunches for {sec}
E rest on your bottom
# Sit zh
T 坐下
T 坐{sec}
T 坐好
T 坐下来待{sec}
T 蹲坐{sec}
T 坐着别动{sec}
V 乖乖坐{sec}
V 坐到地上
E 坐下休息{sec}
E 原地坐{sec}
E 屁股坐好
# StandUp en
T stand up
T get up
T on your feet
T rise
T get back on your feet
T stand
V up you get
V get on all fours again
E stand tall
E get to your feet
# StandUp zh
T 站起来
T 起来
T 起立
T 站好
T 站直
V 快站起来
V 起身
E 四脚站起来
E 站起身来
# Stop en
T stop
T halt
T stop moving
T freeze
T don't move
T stop right there
T stop what you are doing
V hold it
V stay where you are
E quit moving
E stop everything
# Stop zh
T 停
T 停下
T 别动
T 停住
T 不要动了
T 站住
V 快停下来
V 停止动作
E 马上停
E 停止移动
# Bark en
T bark {times}
T bark
T woof {times}
T say woof {times}
T give me {n} barks
T speak
T let out {n} barks
T go woof {times}
V howl {times}
V make {n} woofs
E bark out loud {times}
E let me hear you bark
E woof at me {times}
# Bark zh
T 叫{n}声
T 汪汪叫
T 叫一叫
T 汪{n}声
T 吠{n}下
T 学狗叫{n}声
V 大声叫{n}次
V 汪汪{n}下
E 叫唤{n}声
E 叫上{n}声
E 汪一下给我听
# Dance en
T dance
T dance the {style}
T dance a {style} for {sec}
T dance for {sec}
T show me your {style}
T do a {style}
T perform a {style} for {sec}
T do a little dance
V put on a {style} show
V dance {style} for {sec}
E give us a {style}
E dance some {style} for {sec}
E bust a move
# Dance zh
T 跳舞
T 跳支{style}
T 跳{style}{sec}
T 跳一段{style}
T 跳舞{sec}
T 来一段{style}
T 表演{style}
V 跳个{style}
V 来支舞
E 表演一段{style}{sec}
E 跳一会儿{style} | seconds=3
E 给大家跳个舞
# Wait en
T wait {sec}
T wait for {sec}
T wait
T hold on for {sec}
T pause for {sec}
T pause
T stay put for {sec}
T stay here for {sec}
V give it {sec}
V stand by for {sec}
E hang on for {sec}
E wait there for {sec}
E do nothing for {sec}
# Wait zh
T 等{sec}
T 等一等
T 等待{sec}
T 暂停{sec}
T 在这儿等{sec}
T 停在这里{sec}
V 先等{sec}
V 待命{sec}
E 稍等{sec}
E 原地等{sec}
E 等我{sec}
# Greet en
T say hello to {name}
T greet {name}
T wave to {name}
T say hi to {name}
T wave at {name}
T give {name} a wave
T welcome {name}
T! {name} is here, say hello
V say good morning to {name}
V wave your paw at {name}
E give {name} a friendly hello
E! this is {name}, say hi
E bid {name} welcome
# Greet zh
T 跟{name}打招呼
T 向{name}问好
T 和{name}打个招呼
T 跟{name}说你好
T 对{name}挥挥手
T 欢迎{name}
T! {name}来了，打个招呼
V 向{name}招招手
V 跟{name}说声早上好
E 问候{name}
E! 这是{name}，打个招呼
E 给{name}挥个手
# Follow en
T follow {name}
T follow {name} at {dist}
T walk behind {name}
T walk {dist} behind {name}
T stay behind {name}
T keep {dist} behind {name}
T go after {name}
T go with {name}
V trail {name} by {dist}
V tag along with {name}
E chase after {name}
E follow {name}, but keep {dist} away
E accompany {name}
# Follow zh
T 跟着{name}
T 跟着{name}走
T 跟在{name}后面
T 跟在{name}后面{dist}
T 跟着{name}，保持{dist}
T 和{name}一起走
V 紧跟{name}
V 跟随{name}，距离{dist}
E 追上{name}
E 跟住{name}，离{dist}远
E 陪{name}走
# GoTo en
T go to the {place}
T go to the {place} {speed}
T walk to the {place}
T run to the {place} | speed=fast
T head for the {place}
T move to the {place} {speed}
T go over to the {place}
T go into the {place}
V get yourself to the {place}
V make your way to the {place} {speed}
E come to the {place}
E off to the {place} with you
E proceed {speed} to the {place}
# GoTo zh
T 去{place}
T 到{place}去
T 走到{place}
T {speed}去{place}
T 跑到{place} | speed=fast
T 回{place}
T 去一下{place}
V 前往{place}
V {speed}走到{place}
E 到{place}来
E 移动到{place}
E {speed}赶到{place}
# Patrol en
T patrol the {place}
T patrol the {place} {times}
T guard the {place}
T do {n} rounds of the {place}
T walk around the {place} {times}
T check the {place} {times}
V keep watch over the {place}
V make {n} rounds through the {place}
E inspect the {place} {times}
E do {n} patrols of the {place}
E look after the {place}
# Patrol zh
T 巡逻{place}
T 在{place}巡逻
T 在{place}巡逻{n}圈
T 绕{place}走{n}圈
T 看守{place}
T 检查{place}{n}遍
V 去{place}巡视{n}圈
V 守着{place}
E 巡查{place}{n}遍
E 围着{place}巡{n}圈
E 看好{place}
# Fetch en
T fetch the {obj}
T bring me the {obj}
T get the {obj}
T go get my {obj}
T fetch my {obj}
T bring the {obj} here
T pick up the {obj}
T go and find the {obj}
V grab the {obj}
V carry the {obj} over here
E retrieve the {obj}
E hand me the {obj}
E bring back my {obj}
# Fetch zh
T 把{obj}拿来
T 去拿{obj}
T 帮我拿{obj}
T 捡{obj}
T 把{obj}叼过来
T 给我{obj}
T 去找{obj}
V 取{obj}来
V 把{obj}带过来
E 把{obj}捡回来
E 去把{obj}叼来
E 拿一下{obj}
# ShakePaw en
T give me your paw
T give paw
T shake hands
T give me your {side} paw
T shake with your {side} paw
T lift your {side} paw
T show me the {side} paw
V let me shake your {side} paw
V paw please
E offer me your {side} paw
E put your {side} paw in my hand
E let's shake on it
# ShakePaw zh
T 握手
T 握个手
T 伸{side}爪
T 给我{side}爪
T 抬起{side}前爪
T 把爪子给我
V 伸出{side}手
V 跟我握手
E 举起{side}爪
E 用{side}爪握手
E 爪子给我
# SetVolume en
T set the volume to {pct}
T volume {pct}
T turn the volume to {pct}
T put the sound at {pct}
T speak at {pct} volume
T change the volume to {pct}
T make it {pct} loud
V adjust your volume to {pct}
V sound to {pct}
E bring the volume to {pct}
E set your loudness to {pct}
E speaker at {pct}
# SetVolume zh
T 音量调到{pct}
T 把音量设为{pct}
T 声音调到{pct}
T 音量{pct}
T 把声音开到{pct}
V 将音量调整为{pct}
V 声音设成{pct}
E 音量改成{pct}
E 把喇叭调到{pct}
E 声音放到{pct}
# SetLight en
T turn the light {color}
T set the light to {color}
T make your light {color}
T {color} light
T light up in {color}
T set the light to {color} at {pct}
T {color} light at {pct} brightness
T change the lamp to {color}, {pct} bright
T show a {color} light
V switch to a {color} glow
V glow {color} at {pct}
E change your light to {color}
E shine {color}
E let your light be {color} with {pct} brightness
# SetLight zh
T 灯变成{color}
T 把灯调成{color}
T 亮{color}灯
T 开{color}灯
T {color}灯，亮度{pct}
T 把灯调成{color}，亮度{pct}
T 灯光换成{color}
V 发{color}光
V 灯光设为{color}，亮度{pct}
E 换成{color}的灯
E 亮起{color}灯，亮度{pct}
E 灯改成{color}
# SetTimer en
T set a timer for {min}
T start a timer of {min}
T timer {min}
T remind me in {min}
T wake me in {min}
T set a {min} timer
T count down {min}
T tell me when {min} are over
V start a countdown of {min}
V give me a shout in {min}
E put {min} on the clock
E call me in {min}
E time {min} for me
# SetTimer zh
T 定时{min}
T 设一个{min}的定时器
T {min}后提醒我
T 倒计时{min}
T {min}后叫我
T 计时{min}
V 设置{min}倒计时
V 过{min}告诉我
E 定个{min}的闹钟
E {min}以后喊我
E 帮忙计时{min}
# TakePhoto en
T take a photo
T take {n} photos
T take a picture
T take {n} pictures
T snap a photo
T shoot {n} pictures
T photograph this {times}
V snap {n} shots
V capture a photo
E take {n} snapshots
E get {n} photos of us
E grab a picture
# TakePhoto zh
T 拍照
T 拍{n}张照片
T 照张相
T 拍{n}张
T 给我们拍{n}张照
V 来{n}张照片
V 拍一下照
E 照{n}张相
E 连拍{n}张
E 给我拍照
"""

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
    ],
    ("en", "validation"): ["can you {}?", "I want you to {}", "{} now"],
    ("en", "test"): ["would you {}?", "go ahead and {}", "I'd like you to {}", "{}, will you", "be a good dog and {}"],
    ("zh", "train"): ["请{}", "{}吧", "帮我{}", "现在{}", "来，{}", "小狗，{}", "请你{}"],
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
    ],
    ("en", "validation"): ["{a}, and after that {b}", "{a}, then you {b}"],
    ("en", "test"): [
        "{a} and {b}",
        "{a}, next {b}",
        "{a} and afterwards {b}",
        "start off: {a}, then {b}",
        "{b}, but first {a}",
    ],
    ("zh", "train"): ["先{a}，再{b}", "{a}，然后{b}", "{a}，接着{b}", "{a}，再{b}", "{b}之前先{a}"],
    ("zh", "validation"): ["{a}，之后{b}", "首先{a}，再{b}"],
    ("zh", "test"): ["{a}，随后{b}", "先{a}，然后{b}", "{a}，最后{b}", "第一{a}，第二{b}"],
}
