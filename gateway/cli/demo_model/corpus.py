"""Training text of the demo model: a page of prose about a harbour, written for this purpose."""

TEXT = """\
The harbour wakes before the town does. Small boats come in with the tide and the gulls follow them to the wall.
An old keeper climbs the tower every evening and lights the lamp by hand. He writes the weather into a blue book.
When the fog is thick he rings a bell, three slow strokes and then a pause, until morning.
Nobody asked him to do this, and nobody has ever asked him to stop.
My sister sells bread near the bridge. She says that warm bread can settle almost any quarrel.
In winter the river freezes at the edges, and children throw stones to hear the ice sing.
A good map shows the rocks first and the roads later. A better map also shows where people get lost.
We built the new mill from timber that had once been a ship, so the beams still remember the sea.
The baker, the smith and the teacher play cards on Friday; the smith always loses and always laughs.
Rain falls on the tin roof like a thousand small hammers. Under it the dog sleeps without a care.
Every machine in the workshop has a name. The loudest is called Patience, and it works when it wants to.
If one lamp goes out, another must be lit before the first ship turns toward the shore.
The engineer keeps two pumps ready: one runs, one waits. She trusts neither of them and tests both on Monday.
Letters arrive by noon, carried over the hill in a leather bag that smells of apples.
Some carry news, some carry money, and a few carry only the hand of a friend.
Question what you are told about storms, said the captain, but never question the barometer.
Far to the north there is an island where clocks run slow and the tea is always hot.
Travellers who go there seldom return on time, yet none of them complain.
The garden behind the school grows beans, mint, yellow roses and one stubborn fig.
Under the fig tree somebody left a chair, and under the chair a cat has raised four kittens.
Music begins at eight. A fiddle answers the drum, the drum answers the feet, and the floor answers everyone.
Late at night, when the last song is over, you can hear the water counting its own steps along the pier.
Gold is heavy, iron is honest, copper remembers fire: that is how apprentices learn the metals.
Please close the gate behind you, because the goats are clever and the cabbage is young.
Our grandmother could read the sky as others read a page, line by line, and she was seldom wrong.
Between two heavy clouds she would find a narrow strip of light and say, there, that is tomorrow.
Tall grass bends, dry grass breaks, green grass forgets. Choose well what you want to become.
At the market they trade wool for salt, salt for paper, and paper for promises.
Eleven bridges cross the canal, but only the oldest of them has a song about it.
No bell is so small that it cannot wake a village; no village is so deep asleep that it cannot be woken.
Watch the swallows: low flight means rain, high flight means a dry week for hay.
The doctor walks from house to house with a lantern, a bottle and a very long list.
She forgets nothing, except her hat, which hangs in a different kitchen each day.
Once a year we paint every door along the quay, blue for luck, red for courage, white for rest.
Strangers ask which colour is ours. We tell them to come back in spring and see for themselves.
"""
