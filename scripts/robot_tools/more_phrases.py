"""More training phrasings, in the form of ``phrases.py``."""

MORE_PHRASES = """
# Walk en
T go {dir}
T stroll {dir} {speed}
T wander {dir} for {dist}
T take {dist} {dir}
T march {dir} {dist}
T proceed {dir} by {dist}
T creep {dir} {dist} | speed=slow
T hurry {dir} {dist} | speed=fast
T reverse {dist} | direction=backward
T walk {dist}, {dir}, {speed}
T make it {dist} {dir}
T trot {dir} for {dist}
T come {dir} {dist}
T! {dist} {dir}, {speed}
# Walk zh
T 朝前方走{dist} | direction=forward
T 往后头退{dist} | direction=backward
T 小跑着{dir}{dist} | speed=fast
T {dir}散步{dist}
T 走{dist}，{dir}
T 向前方移{dist} | direction=forward
T {dir}溜达{dist}
T 倒退{dist} | direction=backward
T {speed}{dir}跑{dist}
# Turn en
T turn around {deg} to the {side}
T veer {side}
T spin {deg} {side}
T look {side}
T bend {side} by {deg}
T make a {side} turn of {deg}
T steer {side}
T hook {side} {deg}
T go {side} by {deg}
# Turn zh
T 朝{side}扭{deg}
T {side}拐弯
T {side}转弯{deg}
T 身子往{side}扭
T 掉头往{side}{deg}
T 往{side}旋{deg}
T 头朝{side}
# Spin en
T do a spin
T make {n} turns on yourself
T chase your tail {times}
T turn round and round {times}
T give me {n} pirouettes
T revolve {times}
T perform {n} spins to the {side}
# Spin zh
T 追着尾巴转{n}圈
T 自转{n}圈
T 转起来
T 团团转{n}圈
T 旋{n}圈
# Jump en
T take {n} leaps
T skip {times}
T jump for joy {times}
T make {n} hops
T show me {n} jumps
T vault {times}
T bob up {times}
T jump high {times}
# Jump zh
T 蹦一蹦
T 跃起{n}次
T 弹跳{n}下
T 给我跳{n}个
T 使劲跳{n}下
T 往高处跳{n}下
# Sit en
T be seated
T get down on your bottom for {sec}
T keep sitting for {sec}
T settle down for {sec}
T sit and stay for {sec}
T squat for {sec}
T sit down and wait {sec}
T take your place on the floor
T sit back
# Sit zh
T 坐一会儿 | seconds=3
T 请坐
T 坐下歇{sec}
T 坐住{sec}
T 保持坐姿{sec}
T 一直坐{sec}
T 落座
# StandUp en
T stand on all four legs
T get off the floor
T raise yourself
T stand upright
T up
T lift yourself up
# StandUp zh
T 立起来
T 爬起来
T 挺起身
T 起来站着
T 站到位
# Stop en
T cease
T no more of that
T pull up
T that is enough
T stand still
T stop it now
T abort
T cut it out
# Stop zh
T 住手
T 到此为止
T 定住
T 够了，停
T 打住
T 静止
# Bark en
T yap {times}
T make some noise
T bark loudly {times}
T bark at the door {times}
T give voice {times}
T say something in dog {times}
T do {n} woofs
T growl and bark {times}
# Bark zh
T 喊{n}声
T 嚎{n}下
T 大叫{n}声
T 出个声
T 汪汪汪叫{n}次
T 冲我叫{n}声
# Dance en
T let's dance
T move to the music for {sec}
T start a {style}
T swing your hips to a {style}
T entertain us with a {style}
T go dancing for {sec}
T demonstrate the {style}
T try a {style} for {sec}
T do the {style} dance
# Dance zh
T 舞起来
T 扭一段{style}
T 跳{sec}的{style}
T 秀一段{style}
T 给我们跳{style}
T 开始跳{style}
T 舞动{sec}
# Wait en
T rest for {sec}
T remain here for {sec}
T take a break of {sec}
T don't do anything for {sec}
T stay for {sec}
T delay {sec}
T stop and wait {sec}
# Wait zh
T 歇{sec}
T 别走，等{sec}
T 耐心等{sec}
T 停顿{sec}
T 守在原处{sec}
T 过{sec}再动
T 休息{sec}
# Greet en
T go and meet {name}
T salute {name}
T wish {name} a good day
T nod to {name}
T give my regards to {name}
T tell {name} hello
T! look, {name} has come
T be nice to {name} and say hello
# Greet zh
T 迎接{name}
T 向{name}敬个礼
T 给{name}问个好
T 见过{name}
T 对{name}笑一笑打个招呼
T 跟{name}问声好
# Follow en
T come along with {name}
T stick with {name}
T track {name}
T stay {dist} behind {name}
T run after {name}
T pursue {name} at {dist}
T go where {name} goes
T be the shadow of {name}
T keep up with {name}
# Follow zh
T 随着{name}走
T 跟上{name}
T 追着{name}
T 走在{name}后面{dist}
T 尾随{name}，隔{dist}
T 与{name}同行
T 陪着{name}
# GoTo en
T visit the {place}
T find your way to the {place}
T get to the {place} {speed}
T drop by the {place}
T return to the {place}
T take yourself to the {place}
T show up at the {place}
T wait for me at the {place}
T travel to the {place} {speed}
# GoTo zh
T 走去{place}
T 进{place}
T 到{place}集合
T 往{place}走
T 赶去{place} | speed=fast
T 上{place}去
T {speed}回{place}
# Patrol en
T watch the {place}
T make {n} tours of the {place}
T secure the {place}
T go round the {place} {times}
T walk your rounds in the {place}
T have a look around the {place} {times}
T be on guard in the {place}
T circle the {place} {times}
# Patrol zh
T 在{place}转{n}圈看看
T 看护{place}
T 在{place}站岗
T 把{place}查{n}遍
T 巡{place}{n}圈
T 给{place}放哨
T 看着{place}
# Fetch en
T get me the {obj}
T look for the {obj}
T take the {obj} to me
T collect the {obj}
T find me the {obj}
T deliver the {obj} to me
T pass me the {obj}
T! I need the {obj}, get it
T run for the {obj}
# Fetch zh
T 找{obj}给我
T 叼{obj}来
T 把{obj}送来
T 去捡{obj}
T 递给我{obj}
T 我要{obj}，去拿
T 带{obj}回来
# ShakePaw en
T high five
T your {side} paw
T raise your {side} paw
T let's shake hands
T hold out your {side} paw
T the {side} paw, now
T put your paw here
# ShakePaw zh
T 击掌
T 来握{side}手
T {side}手给我
T 伸爪子
T 把{side}爪抬起来
T 抬手
# SetVolume en
T loudness {pct}
T your voice at {pct}
T set sound level {pct}
T play at {pct} volume
T turn it to {pct}
T go to {pct} volume
T talk at {pct} loudness
T be heard at {pct}
# SetVolume zh
T 喇叭开到{pct}
T 说话音量{pct}
T 响度{pct}
T 声音要{pct}
T 音量设{pct}
T 声音变成{pct}
# SetLight en
T! I want {color} light
T put on the {color} light
T turn {color}
T go {color} at {pct} brightness
T color your lamp {color}
T! the light should be {color}, {pct}
T give me some {color} light
T paint the room {color}
T blink in {color}
# SetLight zh
T 来点{color}光
T 灯光要{color}
T 点亮{color}灯
T 灯设成{color}，{pct}亮
T 把灯换成{color}
T 亮成{color}
T 照出{color}光
# SetTimer en
T let me know in {min}
T alarm in {min}
T ring after {min}
T ping me after {min}
T! I need a timer for {min}
T measure {min}
T set the clock to {min}
T beep in {min}
T a reminder in {min} please
# SetTimer zh
T {min}之后响
T 闹钟定{min}
T 提醒我，{min}后
T 给我计{min}
T 等{min}叫我
T 开始{min}的计时
T 再过{min}提醒我
# TakePhoto en
T photograph us
T take our picture
T make {n} photos
T get the camera out, {n} pictures
T shoot a photo
T a photo of this
T a picture of the family
T take {n} photos in a row
# TakePhoto zh
T 给它照相
T 拍下来
T 来个合影
T 拍照{n}张
T 照{n}张照片
T 摄影
T 多拍几张，{n}张
"""
