"""Hand-written requests that the device must hand on: values out of range, values that are missing, actions it has not.
``T``, ``V``, ``E`` as in ``phrases.py``; a reply follows ``=>``. Open questions come from the robot-intent set.
"""

CLOUD = """
# range en
T walk {far} metres forward => Ten metres is as far as I can walk in one go.
T go back {far} metres => Ten metres is as far as I can walk in one go.
T move {far} meters to the left => Ten metres is as far as I can walk in one go.
T turn left {wide} degrees => I can turn by 360 degrees at most.
T rotate {wide} degrees to the right => I can turn by 360 degrees at most.
T spin {many} times => Ten spins are the most I can do.
T jump {many} times => Ten jumps are the most I can do.
T bark {many} times => Ten barks are enough for the neighbours.
T set the volume to {over} percent => The volume goes up to 100 percent.
T turn the light red at {over} percent => The brightness goes up to 100 percent.
T set a timer for {days} hours => My timer runs for three hours at most.
T take {many} photos => I can take ten photos at a time.
T sit down for {days} hours => I can stay seated for ten minutes at most.
T wait {days} hours => I can wait for ten minutes at most.
V step {far} metres ahead => Ten metres is as far as I can walk in one go.
V volume up to {over} percent => The volume goes up to 100 percent.
V hop {many} times => Ten jumps are the most I can do.
V turn right by {wide} degrees => I can turn by 360 degrees at most.
E march {far} metres straight on => Ten metres is as far as I can walk in one go.
E swivel {wide} degrees to the left => I can turn by 360 degrees at most.
E woof {many} times => Ten barks are enough for the neighbours.
E speaker at {over} percent => The volume goes up to 100 percent.
E time {days} hours for me => My timer runs for three hours at most.
E go {far} meters backwards => Ten metres is as far as I can walk in one go.
E do {many} twirls => Ten spins are the most I can do.
# range zh
T 向前走{far}米 => 我一次最多走十米。
T 后退{far}米 => 我一次最多走十米。
T 往左走{far}米 => 我一次最多走十米。
T 向左转{wide}度 => 我最多转三百六十度。
T 往右转{wide}度 => 我最多转三百六十度。
T 转{many}圈 => 我最多转十圈。
T 跳{many}下 => 我最多跳十下。
T 叫{many}声 => 我最多叫十声。
T 音量调到{over}% => 音量最高是百分之百。
T 把灯调成蓝色，亮度{over}% => 亮度最高是百分之百。
T 定时{days}小时 => 我最多计时三小时。
T 拍{many}张照片 => 我一次最多拍十张。
T 坐{days}小时 => 我最多坐十分钟。
V 往前迈{far}米 => 我一次最多走十米。
V 声音设成{over}% => 音量最高是百分之百。
V 往上跳{many}次 => 我最多跳十下。
E 直走{far}米 => 我一次最多走十米。
E 身体向右转{wide}度 => 我最多转三百六十度。
E 叫唤{many}声 => 我最多叫十声。
E 音量改成{over}% => 音量最高是百分之百。
E {days}小时以后喊我 => 我最多计时三小时。
# missing en
T turn => Left or right?
T turn {deg} => Left or right?
T follow => Whom shall I follow?
T follow somebody => Whom shall I follow?
T say hello => To whom?
T greet the guest => What is the guest's name?
T fetch => What shall I fetch?
T bring me that => What shall I bring?
T go there => Where shall I go?
T go to the room => Which room?
T patrol => Which place?
T set a timer => For how long?
T remind me later => In how many minutes?
T change the volume => To how many percent?
T change the light => Which colour?
T walk {dist} => In which direction?
T move => In which direction?
V rotate {deg} => Left or right?
V walk behind them => Whom shall I follow?
V start a countdown => For how long?
V get me something => What shall I bring?
E swivel a bit => Left or right?
E shift {dist} => In which direction?
E chase after them => Whom shall I follow?
E put some time on the clock => For how long?
E retrieve it => What shall I fetch?
E bid them welcome => What are their names?
E adjust the loudness => To how many percent?
# missing zh
T 转 => 往左还是往右？
T 转{deg} => 往左还是往右？
T 跟着 => 跟着谁？
T 跟着他 => 跟着谁？
T 打个招呼 => 跟谁打招呼？
T 拿来 => 拿什么？
T 把那个拿来 => 拿什么？
T 过去那边 => 去哪里？
T 去巡逻 => 巡逻哪里？
T 设个定时器 => 多长时间？
T 等会儿提醒我 => 几分钟以后？
T 调一下音量 => 调到多少？
T 换个灯光 => 什么颜色？
T 走{dist} => 往哪个方向？
T 移动 => 往哪个方向？
V 旋转{deg} => 往左还是往右？
V 跟随 => 跟着谁？
V 倒计时 => 多长时间？
E 身体转一转 => 往左还是往右？
E 挪{dist} => 往哪个方向？
E 追上他们 => 跟着谁？
E 把它捡回来 => 捡什么？
E 定个闹钟 => 多长时间？
# unknown en
T go to the moon => I only know the rooms of this house.
T go to the office => I do not know an office here.
T patrol the forest => I only know the rooms of this house.
T dance a ballet => I know waltz, tango, cha-cha and hip-hop.
T turn the light pink => My light cannot be pink.
T play chess with me => I cannot play chess.
T open the window => I cannot open windows.
T order a pizza => I cannot order food.
T do a handstand => I cannot stand on my paws.
T climb the stairs => I cannot climb stairs.
T call Anna on the phone => I cannot make calls.
T play some music => I have no music.
T turn on the television => I cannot reach the television.
T swim across the pool => I cannot swim.
T sing a song => I cannot sing.
T write an email to Tom => I cannot write mails.
V drive to the airport => I cannot drive.
V make your light orange => My light cannot be orange.
V read me the news => I cannot read the news.
V lock the front door => I cannot lock doors.
E go to the supermarket => I do not know a supermarket here.
E shine brown => My light cannot be brown.
E give us a polka => I know waltz, tango, cha-cha and hip-hop.
E water the flowers => I cannot water flowers.
E clean the floor => I cannot clean.
E send a message to Lucy => I cannot send messages.
E build a tower => I cannot build anything.
# unknown zh
T 去月球 => 我只认识家里的房间。
T 去办公室 => 这里没有办公室。
T 巡逻森林 => 我只认识家里的房间。
T 跳芭蕾 => 我会华尔兹、探戈、恰恰和街舞。
T 开粉色灯 => 我的灯没有粉色。
T 陪我下棋 => 我不会下棋。
T 打开窗户 => 我不会开窗。
T 点一份外卖 => 我不会点外卖。
T 倒立 => 我不会倒立。
T 爬楼梯 => 我不会爬楼梯。
T 给妈妈打电话 => 我不会打电话。
T 放点音乐 => 我没有音乐。
T 唱首歌 => 我不会唱歌。
V 开车去机场 => 我不会开车。
V 灯光设为橙色 => 我的灯没有橙色。
V 念一下新闻 => 我不会念新闻。
E 去超市 => 这里没有超市。
E 灯改成棕色 => 我的灯没有棕色。
E 浇花 => 我不会浇花。
E 扫地 => 我不会扫地。
E 给小明发消息 => 我不会发消息。
"""

REPLIES = {
    "Walk": ("On my way.", "出发。"),
    "Turn": ("Turning.", "转身。"),
    "Spin": ("Here I spin.", "转圈圈。"),
    "Jump": ("Hop!", "跳！"),
    "Sit": ("Sitting.", "坐好了。"),
    "StandUp": ("I am up.", "站起来了。"),
    "Stop": ("Stopped.", "停下了。"),
    "Bark": ("Woof!", "汪！"),
    "Dance": ("Watch me.", "看我跳。"),
    "Wait": ("I am waiting.", "我等着。"),
    "Greet": ("Hello!", "你好！"),
    "Follow": ("Right behind.", "跟上了。"),
    "GoTo": ("Going there.", "这就去。"),
    "Patrol": ("On patrol.", "巡逻中。"),
    "Fetch": ("I will get it.", "我去拿。"),
    "ShakePaw": ("Nice to meet you.", "握握手。"),
    "SetVolume": ("Volume set.", "音量好了。"),
    "SetLight": ("Light set.", "灯好了。"),
    "SetTimer": ("Timer set.", "计时开始。"),
    "TakePhoto": ("Smile!", "茄子！"),
}
