"""Little stories out of a grammar: the corpus of `opt-tiny`.

A story is one of the `PLOTS`, told about a cast and a scene that are drawn first. Every line of a plot is a template:

    [a|b|c]    one of the alternatives, which may hold further brackets; an empty one is allowed
    {name}     what the story has bound to that name: {hero}, {he}, {friend}, {noun}, {weather}, …
    {Name}     the same, with a capital

What is bound stays bound, so the red ball that is lost in the second sentence is the red ball that is found in the
ninth, a girl stays "she", and five apples less two are three. Earlier alternatives are likelier than later ones: a
model of the stories then has a clear favourite at every step, and its greedy text does not hang on rounding.

`python corpus.py --stories 5` prints some of them. The whole text is this file's own.
"""

import argparse
import dataclasses
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

Row = Mapping[str, str]
T = TypeVar("T")


def table(columns: str, text: str) -> tuple[Row, ...]:
    """Rows of a small table: one a line, cells between bars, under the space-separated names of `columns`."""
    names = columns.split()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    return tuple(dict(zip(names, row, strict=True)) for row in rows)


# --- who ----------------------------------------------------------------------------------------------------------

GIRLS = (
    "Lily Mia Anna Rosa Emma Nora Ella Clara Ruby Ivy Hazel Alice Lucy Molly Daisy Zoe Maya Olive Sara Tina Julia Eva "
    "Penny Wendy Holly Nina Amy Kate Grace Fern Iris Leah Betty Dora Flora Greta Hannah June Kira Luna"
).split()
BOYS = (
    "Tom Ben Max Sam Leo Jack Finn Noah Oscar Theo Hugo Eli Felix Adam Peter Jonas Omar Luke Nico Toby Paul Henry Ian "
    "Carl Milo Oliver Ravi Simon Victor Will Alex Bruno David Emil Frank George Hans Ivan Jim Kai"
).split()

KINDS = table(
    "kind home",
    """
    child | in a small house by the river
    child | in a white cottage near the forest
    child | in a village by the sea
    child | on a farm behind the hills
    child | in a tall house on a quiet street
    child | above the bakery in a busy town
    child | in a little house under a big oak tree
    fox | in a den under the old oak
    rabbit | in a burrow below the hedge
    bear | in a cave on the green hill
    mouse | in a hole behind the kitchen wall
    squirrel | in a hollow tree near the pond
    frog | among the reeds of the pond
    hedgehog | under a pile of dry leaves
    badger | in a deep den in the forest
    otter | in a hut of sticks by the river
    duck | in a nest near the water
    """,
)

ELDERS = table(
    "elder ehe ehim ehis",
    """
    mother | she | her | her
    father | he | him | his
    grandmother | she | her | her
    grandfather | he | him | his
    aunt | she | her | her
    uncle | he | him | his
    """,
)

NEIGHBORS = table(
    "who whe whim whis work shop",
    """
    Mrs. Hill | she | her | her | baker | bakery
    Mr. Brown | he | him | his | farmer | farm
    Mrs. Green | she | her | her | gardener | garden shop
    Mr. Stone | he | him | his | carpenter | workshop
    Mrs. Rivers | she | her | her | teacher | school
    Mr. Field | he | him | his | miller | mill
    Mrs. Bell | she | her | her | clockmaker | clock shop
    Mr. Marsh | he | him | his | fisherman | boat house
    """,
)

# --- where and when -----------------------------------------------------------------------------------------------

PLACES = table(
    "place at ground",
    """
    forest | in the forest | moss
    garden | in the garden | grass
    park | in the park | grass
    river | by the river | sand
    meadow | in the meadow | flowers
    beach | on the beach | sand
    pond | by the pond | reeds
    hill | on the hill | heather
    orchard | in the orchard | leaves
    field | in the field | hay
    """,
)

WIDE_PLACES = tuple(row for row in PLACES if row["place"] in {"forest", "river", "meadow", "hill", "field"})

WEATHERS = table(
    "weather sky",
    """
    sunny | The sun was shining and the sky was blue.
    warm | The air was soft and smelled of flowers.
    windy | The wind was singing in the trees.
    cloudy | Gray clouds hung over the roofs.
    cold | The air was so cold that every breath made a little cloud.
    rainy | Rain was tapping on the windows.
    foggy | Fog lay over the fields like a blanket.
    bright | The birds were singing and the bees were humming.
    """,
)
FAIR = tuple(row for row in WEATHERS if row["weather"] in {"sunny", "warm", "bright"})
ROUGH = tuple(row for row in WEATHERS if row["weather"] in {"windy", "cloudy", "rainy"})
DARK = tuple(row for row in WEATHERS if row["weather"] in {"windy", "warm", "cold", "rainy", "foggy"})
CLEAR = tuple(row for row in WEATHERS if row["weather"] in {"warm", "windy", "cold"})

TIMES = table("time", "morning\nafternoon\nday\nevening")

# --- what ---------------------------------------------------------------------------------------------------------

COLORS = table("color", "red\nblue\nyellow\ngreen\norange\npurple\nsilver\nbrown\nwhite\npink\ngolden\nblack")

THINGS = table(
    "noun use",
    """
    ball | play with
    hat | put on
    scarf | put on
    boat | play with
    doll | play with
    book | read
    drum | play
    whistle | blow
    lantern | light
    umbrella | take
    button | sew on
    cup | drink from
    ring | put on
    puppet | play with
    blanket | sleep under
    kite | fly
    """,
)

TOYS = table("noun", "ball\nkite\nboat\ndrum\nwagon\npuzzle\npuppet\nswing\ntrain\nrope")

SPOTS = table(
    "spot reason",
    """
    under the bed | It had rolled there in the night
    behind the sofa | It had fallen down from the window
    in the apple tree | The wind had carried it up
    in the basket of the dog | The dog had taken it to bed
    under a pile of leaves | The wind had covered it
    in the tall grass | It had dropped out of the bag
    behind the flower pot | The cat had pushed it there
    on the roof of the shed | A crow had taken it and left it there
    under the old bench | It had slipped through the boards
    in the big boot by the door | Nobody had looked in there
    """,
)

SEARCHES = table(
    "search",
    "in the kitchen\nunder the table\nbehind the door\nin the cupboard\nunder the stairs\nin the barn\nnext to the well",
)

FOODS = table(
    "food crumb",
    """
    cake | bite
    apple pie | slice
    loaf of bread | piece
    bowl of soup | spoonful
    pear | bite
    sandwich | crumb
    plum tart | slice
    pancake | bite
    piece of cheese | crumb
    honey bun | bite
    """,
)

FRUITS = table(
    "fruit fruit_one tree",
    """
    apples | apple | under the apple tree
    berries | berry | at the edge of the forest
    nuts | nut | under the hazel bush
    shells | shell | on the beach
    plums | plum | in the orchard
    stones | stone | by the river
    eggs | egg | in the hen house
    flowers | flower | in the meadow
    mushrooms | mushroom | in the forest
    pears | pear | behind the barn
    """,
)

NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()

ANIMALS = table(
    "animal young den feed sound hide",
    """
    bird | baby bird | nest | seeds | chirp | under a tree
    cat | kitten | basket | milk | meow | behind the barn
    dog | puppy | kennel | bread | whimper | beside the road
    duck | duckling | pond | corn | peep | in the reeds
    sheep | lamb | field | grass | bleat | behind a fence
    rabbit | little rabbit | burrow | carrots | squeak | in the bushes
    owl | baby owl | hollow tree | crumbs | hoot | on the ground
    hedgehog | baby hedgehog | pile of leaves | berries | squeak | in a ditch
    goat | little goat | stable | hay | bleat | between two rocks
    """,
)

HURTS = table(
    "hurt cure",
    """
    had hurt its leg | tied a soft cloth around its leg
    was cold and wet | wrapped it in a warm towel
    was very hungry | gave it something to eat
    had a thorn in its foot | pulled out the thorn very gently
    had lost its way | spoke to it softly
    """,
)

FEARS = table(
    "fear where truth lesson",
    """
    the dark | in the dark | the dark was full of tiny stars | the night is only the day asleep
    thunder | in the storm | the thunder was only a big drum in the sky | loud things can be harmless
    deep water | at the lake | the water could carry people gently | water is kind to those who learn to swim
    the big dog | at the gate | the big dog only wanted to play | a loud bark can hide a soft heart
    high places | on the old bridge | the bridge was strong and safe | small steps lead across
    the old house | at the old house | the old house was full of sleeping doves | an open door lets the fear out
    """,
)

SKILLS = table(
    "skill fail well",
    """
    ride a bicycle | fell into the grass | rode all the way to the mill
    swim | swallowed a lot of water | swam across the pond
    whistle | made no sound at all | whistled a whole song
    skate | slipped and sat down on the ice | skated in a big circle
    juggle | dropped every ball | kept three balls in the air
    bake bread | burned the crust | baked a golden loaf
    play the flute | made a noise like an angry goose | played a gentle tune
    climb the rope | slid down again | climbed up to the top
    paint | spilled the paint | painted a picture of the sea
    dance | stepped on every foot | danced until the music stopped
    """,
)

SEEDS = table(
    "seed plant crop",
    """
    bean | bean plant | long green beans
    sunflower seed | sunflower | a thousand new seeds
    pumpkin seed | pumpkin vine | a huge orange pumpkin
    tomato seed | tomato plant | sweet red tomatoes
    rose seed | rose bush | one perfect rose
    pea | pea plant | fat green peas
    strawberry seed | strawberry plant | a bowl of strawberries
    """,
)

NOISES = table(
    "noise source act",
    """
    scratching | kitten | wanted to come in
    tapping | branch | was knocking on the window
    rustling | mouse | was looking for crumbs
    humming | kettle | was singing on the stove
    squeaking | gate | was swinging in the wind
    rumbling | hedgehog | was pushing a flower pot
    whispering | curtain | was moving in the wind
    """,
)

BUILDS = table(
    "build stuff danger event",
    """
    sand castle | sand and shells | wave | washed it away
    tower | wooden blocks | cat | knocked it over
    tree house | old boards | storm | blew it down
    raft | logs and rope | rock | broke it in two
    snowman | fresh snow | sun | melted it
    bird house | thin boards | wind | shook it from the tree
    hut | sticks and leaves | storm | blew it down
    bridge | flat stones | flood | carried it away
    """,
)

GIFTS = table(
    "gift from made",
    """
    card | paper and paint | drew a big sun on it
    scarf | soft wool | knitted every evening
    cake | flour and honey | put berries on top
    necklace | shells and thread | tied them one by one
    song | a few happy words | practiced it in the barn
    basket | thin willow twigs | wove them tightly
    lamp | a jar and a candle | painted stars on the glass
    """,
)

WARES = table(
    "ware shop need",
    """
    loaf of bread | bakery | supper
    bag of flour | mill | a cake
    jar of honey | market | the tea
    pot of paint | shop | the fence
    ball of wool | market | a warm scarf
    bottle of milk | farm | the pancakes
    new lamp | shop | the dark hall
    """,
)

BEGGARS = table(
    "beggar bhe bhim bhis trouble back",
    """
    old woman | she | her | her | had nothing to eat | a handful of magic beans
    old man | he | him | his | had lost his purse | a small brass key
    young sailor | he | him | his | was far from home | a shell that sang like the sea
    tired peddler | he | him | his | had a broken cart | a ribbon for every day of the week
    little girl | she | her | her | was crying in the street | her very best smile
    """,
)

SKIES = table(
    "light wish",
    """
    shooting star | a friend
    full moon | a safe journey
    rainbow | a little brother
    evening star | a warm winter
    northern light | a great adventure
    """,
)

# --- plots --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """One kind of story.

    Attributes:
        traits: what the hero can be like in it.
        weathers: in what weather it can happen.
        tables: what else is drawn before the story is told: one row of each.
        lines: templates, in order.
    """

    traits: str
    lines: tuple[str, ...]
    weathers: Sequence[Row] = WEATHERS
    tables: tuple[Sequence[Row], ...] = ()


LOST = Plot(
    traits="careful quiet gentle dreamy",
    tables=(COLORS, THINGS, SPOTS, SEARCHES),
    lines=(
        "{Hero} had a {color} {noun} that {his} {elder} had given {him}[. {He} took it everywhere|, and {he} loved it "
        "more than anything|. It was {his} favorite thing in the whole world].",
        "One {weather} {time}, {hero} wanted to {use} the {noun}, but it was gone.",
        "{He} looked {search}, but the {noun} was not there[. {He} looked in every room, but {he} could not find it|].",
        '[{Hero} sat down on the step and began to cry|{Hero} felt very sad|A tear ran down the cheek of {hero}]. "What '
        'is wrong?" asked {friend}. "I have lost my {color} {noun}," said {hero}.',
        '"[Do not worry|Do not cry|Dry your eyes]," said {friend}. "[We will find it together|I will help you|Four '
        'eyes see more than two]."',
        "They looked [everywhere|here and there|for a long time]. [Then|At last|Suddenly], {friend} saw something "
        "{color} {spot}. It was the {noun}! {reason}.",
        '{Hero} [laughed and hugged {friend}|jumped for joy|was so happy that {he} danced]. "Thank you," {he} said. '
        '"[You are a true friend|You have the best eyes in the world]."',
        "[From that day on, {hero} always knew where the {noun} was|That night, {hero} went to sleep with the {color} "
        "{noun} [beside {him}|in {his} arms]|And {hero} never lost the {noun} again].",
    ),
)

SHARE = Plot(
    traits="hungry kind cheerful generous",
    tables=(FOODS, PLACES),
    lines=(
        "One {weather} {time}, {his} {elder} gave {hero} a {food}. [It smelled wonderful|It was still warm]. {Hero} took "
        "it and went to sit {at}.",
        "{At}, {he} met {friend}, who looked [sad|tired|hungry]. "
        '"What is the matter?" asked {hero}. "I have had nothing to eat [today|since morning]," said {friend}.',
        "{Hero} looked at the {food}. [It was not very big|{He} was hungry too|There was only one], but {he} [did not "
        "think for long|knew what to do].",
        '{He} [broke it|cut it] in two and gave {friend} the [bigger|bigger and better] half. "[Here, this is for you|Let '
        'us share]," {he} said.',
        "They [sat in the {ground}|sat side by side] and ate every last {crumb}. [Nothing had ever tasted so "
        "good|It tasted better than ever].",
        "[The next day|A week later|Some days later], {friend} came to the door with [a basket of berries|a jar of "
        'honey|a bag of sweet nuts]. "[You shared with me, so now I share with you|This is for both of us]," said '
        "{friend}.",
        "{Hero} smiled. [{He} had given away half of a {food} and had found a whole friend|Now {he} knew that sharing "
        "makes everything bigger|And from then on, they shared everything].",
    ),
)

COUNT = Plot(
    traits="clever busy cheerful patient",
    weathers=FAIR,
    tables=(FRUITS,),
    lines=(
        "One {weather} {time}, {hero} took a basket and went to look for {fruit}. {Sky}",
        '{He} found {n} {fruit} {tree}. "[Look, {friend}|Come and see]," {he} called. "I have {n} {fruit}!"',
        '{Friend} looked into [the basket|{fhis} own basket] and sighed. "I have none," {fhe} said. "[I looked all day|'
        'I came too late]."',
        "{Hero} [counted again and thought about it|thought for a moment]. Then {he} gave {friend} {k} {k_fruit}. Now "
        "{hero} had {rest} {rest_fruit} and {friend} had {k}.",
        '"Are you not sorry?" asked {friend}. "{Rest} {rest_is} enough for me," said {hero}. "[What would I do with '
        '{n}?|It is no fun to have {n} when you have none.]"',
        "They walked home together and [sang a song|told each other stories|swung their baskets]. [{His} {elder} had "
        "seen it all from the window and was very proud|At home, {his} {elder} kissed {hero} on the nose].",
        "[And the {fruit} had never been so beautiful|They put the {fruit} in one big bowl, and there were {n} again].",
    ),
)

RESCUE = Plot(
    traits="kind gentle brave caring",
    tables=(ANIMALS, HURTS, PLACES),
    lines=(
        "One {weather} {time}, {hero} was walking {at}.[ {Sky}|] [All at once|Suddenly], {he} heard a soft {sound}.",
        "{He} followed the sound and found a {young} {hide}. It {hurt}, and it was [shaking|afraid|all alone].",
        '"[Poor little thing|Do not be afraid]," [said|whispered] {hero}. "I will help you." {He} {cure}.',
        "Then {he} [took it home|carried it home under {his} coat] and gave it {feed}. [The {young} ate and fell "
        "asleep|It ate a little and closed its eyes].",
        'The next morning, the {young} was [much better|strong again]. "[It must go back to its mother|It misses its '
        'mother]," said {his} {elder}. {Hero} was a little sad, but {he} knew that it was true.',
        "So {hero} and {friend} took the {young} back to its {den}. [The mother was waiting there|There stood "
        "the mother, looking everywhere]. When she saw her little one, she [was full of joy|ran to meet it].",
        "[Every day after that, the {young} came to the window to say hello|The {young} looked back one last time, as if "
        "to say thank you|And whenever {hero} walked {at}, the {animal} was never far away].",
    ),
)

FEAR = Plot(
    traits="shy small timid careful",
    tables=(FEARS,),
    lines=(
        "There was one thing that [made {hero} shiver|{hero} did not like]: {he} was afraid of {fear}.",
        '"[You are afraid of {fear}|Why do you hide]?" asked {friend} one {weather} {time}. {Hero} [looked at {his} '
        "feet|turned red] and said nothing.",
        '"[Everyone is afraid of something|I was afraid too, once]," said {friend}. "Come, I will [hold your hand|stay '
        'right beside you]."',
        "{Hero} [took a deep breath|counted to three] and went along. [{His} knees were shaking|{His} heart was beating "
        "fast], but {he} did not let go of {friend}.",
        "They stood still {where} and [waited|listened]. And then {hero} saw that {truth}. [It was not terrible at "
        "all|It was even a little beautiful].",
        '"I did it!" [cried|shouted] {hero}. "I am not afraid of {fear} anymore!" They [laughed until their bellies '
        "hurt|danced in a circle].",
        "That evening, {hero} told {his} {elder} [everything|the whole story]. {His} {elder} [smiled|nodded] and said, "
        '"{Lesson}."',
    ),
)

LEARN = Plot(
    traits="stubborn patient brave proud",
    tables=(SKILLS,),
    lines=(
        "{Hero} wanted to {skill}[ more than anything|]. All {his} friends could do it, but {he} could not.",
        "One {weather} {time}, {he} tried for the first time. {He} {fail}. [Everybody laughed|It hurt a little|What a "
        "mess].",
        '"[I will never learn it|I give up]," said {hero}. But {friend} shook {fhis} head. "[Nobody can do it on the first '
        'day|Try again tomorrow]," {fhe} said. "[I will show you how|I will help you]."',
        "So {hero} tried on the second day, and {he} {fail} again. {He} tried on the third day, and it [went a little "
        "better|was not so bad].",
        "{He} practiced every {time}, [in sun and rain|week after week]. [{Friend} came along and clapped {fhis} hands|"
        "{His} {elder} watched from the window].",
        "And [one day|then, on the [tenth|seventh|hundredth] day], it happened. {Hero} {well}! [Nobody laughed now|Everybody cheered].",
        '"[How did you do it|What is your secret]?" asked {his} {elder}. "[I failed, and then I '
        'tried once more|I fell down ten times and got up eleven times]," [said {hero}|{he} said with a smile].',
    ),
)

PLANT = Plot(
    traits="patient quiet curious dreamy",
    weathers=FAIR,
    tables=(SEEDS,),
    lines=(
        "One {weather} {time}, {hero} found a {seed} in {his} pocket. [{He} dug a small hole in the garden and put it in|"
        "{He} put it in the soft earth behind the house].",
        '[Every morning|Every day], {he} gave it water and said, "Grow, little {seed}." But [nothing happened|there was '
        "only brown earth].",
        '"[It is asleep|It will not grow]," said {friend}. "[You must be patient|Forget it]." {Hero} did not give up. {He} '
        "waited for {n} days.",
        "Then, [one {weather} morning|after a night of soft rain], a tiny green leaf looked out of the ground. {Hero} "
        "[called {friend} at once|shouted for joy].",
        "The leaf became a {plant}. It grew up to {his} knees, then up to {his} nose[, and then up to the window|].",
        "At the end of the summer, the {plant} gave {him} {crop}. [{Friend} could not believe it|It was more than {he} "
        "could carry].",
        "{Hero} [shared with {friend}|gave half to {friend}] and kept one {seed} for the next year. [{He} put it in {his} "
        'pocket and smiled|"Sleep well," {he} whispered].',
    ),
)

NIGHT = Plot(
    traits="curious brave clever shy",
    weathers=DARK,
    tables=(NOISES,),
    lines=(
        "One {weather} night, {hero} woke up. [It was very dark|The moon was behind a cloud]. From somewhere in the house "
        "came a {noise} sound.",
        '"[Who is there|What is that]?" whispered {hero}. Nobody answered. [The {noise} went on|But there it was again].',
        "{He} [pulled the blanket over {his} head|hid under the blanket]. [Was it a ghost|Was it a monster|Was it a "
        "robber]? {He} [could not sleep|did not dare to move].",
        "At last, {he} [woke {friend}, who was sleeping in the other bed|took a candle and woke {friend}]. Together they "
        "[crept down the stairs|walked through the dark hall] on their toes.",
        "The sound came from [behind the kitchen door|the kitchen]. {Hero} [counted to three and opened the door|held up "
        "the candle].",
        'There was no [ghost|monster] at all. It was only a {source} that {act}! "[A {source}|Only a {source}]," said '
        "{friend}, and they both began to laugh.",
        "They drank a cup of warm milk and went back to bed. [And when {hero} heard the {noise} again, {he} only smiled "
        "and slept on|Soon the house was quiet, and everybody slept until morning].",
    ),
)

BUILD = Plot(
    traits="clever busy stubborn cheerful",
    tables=(BUILDS, COLORS),
    lines=(
        "One {weather} {time}, {hero} began to build a {build} out of {stuff}. [{He} worked for hours|{He} worked until "
        "{his} hands were sore].",
        '[When it was done|When it was ready], {he} stood back and looked at it. "[It is the best {build} in the world|'
        'I made it all by myself]," {he} said.',
        "But then the {danger} {event}. [In one moment, everything was gone|Nothing was left of the {build}].",
        "{Hero} [kicked a stone|stamped {his} foot] and [was very angry|felt like crying]. {Friend} had seen it all. "
        '"[I am sorry|What a pity]," said {friend}. "[Shall we build a new one?|Let us build it again, together.]"',
        "{Hero} [dried {his} eyes|nodded]. {Friend} [brought more {stuff}|fetched the {stuff}] and {hero} [put it all in "
        "place|showed {fhim} how to do it]. This time they [thought of the {danger}|made it stronger and safer].",
        "By the evening, the new {build} was [twice as big|even better than the first]. [They put a small {color} flag on "
        "top|They gave it a name and a little {color} flag].",
        'The {danger} [did not harm it again|came back, but this {build} stood firm]. ["Two builders are better than '
        'one," said {hero}|And {hero} knew that two can do what one cannot].',
    ),
)

GIFT = Plot(
    traits="generous kind dreamy caring",
    tables=(GIFTS, COLORS),
    lines=(
        "It was almost the birthday of {friend}, and {hero} had no [present|gift]. {He} had no [money|coins] either.",
        '"[What shall I do|What can I give]?" {he} asked {his} {elder}. "[Make something yourself|The best gifts are made '
        'by hand]," said {his} {elder}.',
        "So {hero} took {from} and made a {gift}. {He} {made}. [It took {n} days|It was hard work], [but {he} did not stop|"
        "and {he} told nobody about it].",
        "On the {weather} {time} of the birthday, all the others came with big {color} boxes. {Hero} [felt small|became "
        "very quiet]. {His} {gift} [looked so simple|had no ribbon at all].",
        '{Friend} opened the boxes one after the other. Then {fhe} [saw the {gift}|came to the {gift}]. "Who made this?" '
        '{fhe} asked. "[I did|I made it for you]," said {hero} softly.',
        '{Friend} [hugged {hero}|smiled from ear to ear]. "[It is the best present of all|I like this one most of all]," '
        '{fhe} said. "[You made it just for me|Nobody else has one like it]."',
        "[They ate cake and played until dark|Then the music began, and they danced until the stars came out], and {hero} "
        "was [happy|the happiest guest of all].",
    ),
)

MARKET = Plot(
    traits="honest kind busy polite",
    tables=(WARES, BEGGARS),
    lines=(
        'One {weather} {time}, {his} {elder} gave {hero} {n} coins. "Go to the {shop} and buy a {ware}," {ehe} said. "We '
        'need it for {need}."',
        "On the way, {hero} met a {beggar} who {trouble}. {Hero} [felt sorry for {bhim}|could not just walk on].",
        '{He} gave {bhim} {k} {k_coins}. "[Thank you, child|You are very kind]," said the {beggar}. "[I will not forget '
        'it|One day I will pay you back]."',
        "Now {hero} had only {rest} {rest_coins} left. [At the {shop}, that was not enough|The {ware} was too "
        "expensive]. {He} told {friend}, who worked there, [what had happened|the whole story].",
        '"[You have a good heart|You did the right thing]," said {friend}. {Fhe} [took the {rest_coins}|counted the '
        "{rest_coins}] and gave {hero} the {ware} [anyway|all the same].",
        'At home, {hero} told {his} {elder} everything. {His} {elder} was not angry at all. ["I am proud of you," {ehe} '
        'said|"A kind deed is worth more than {n} coins," {ehe} said].',
        "[The next morning|A week later], there was a small bag at the door. In it {he} found {back}. [It came from the "
        "{beggar}|The {beggar} had kept {bhis} word].",
    ),
)

QUARREL = Plot(
    traits="proud stubborn lively loud",
    tables=(COLORS, TOYS),
    lines=(
        "{Hero} and {friend} were best friends. But one {weather} {time}, both of them wanted the {color} {noun}.",
        '"[It is mine|I had it first]!" [shouted|cried] {hero}. "No, [it is mine|I had it first]!" [shouted|cried] '
        "{friend}. They pulled and pulled, until the {noun} [broke|fell into the mud].",
        '"[Look what you did|That was your fault]," said {hero}. {He} [ran home and slammed the door|turned around and walked away]. '
        "{Friend} went home too, and {fhe} was [just as angry|very unhappy].",
        'The next day was long and [boring|gray]. {Hero} had nobody to play with. ["It was only a {noun}," {he} thought|'
        "{He} looked out of the window and missed {friend}].",
        '"What should I do?" {he} asked {his} {elder}. "[Say that you are sorry|Two little words can mend a friendship]," '
        "said {his} {elder}.",
        '{Hero} went to the house of {friend} and knocked. "I am sorry," {he} said. "I am sorry too," said {friend}. [They '
        "both laughed|And then they both had to smile].",
        "Together they [mended|cleaned] the {color} {noun}. [From then on, they took turns|And it was much more fun to play "
        "with it together].",
    ),
)

WISH = Plot(
    traits="dreamy lonely quiet curious",
    weathers=CLEAR,
    tables=(SKIES, PLACES, COLORS, FOODS),
    lines=(
        "One {weather} evening, {hero} was sitting {at}. {He} looked up and saw a {light}[ above the trees|]. It was so "
        "bright that {he} held {his} breath.",
        '"[If you see a {light}, you can make a wish|A {light} brings good luck]," {his} {elder} had told {him}. So {hero} '
        "closed {his} eyes and wished for {wish}.",
        '[The next morning|The next day], {he} ran to the door, but nobody was there. ["It does not work," {he} thought|'
        "Everything looked the same as before].",
        '{He} walked {at} again and kicked the {ground}. There sat a small {fkind} with a {color} [hat|scarf]. "My name is '
        '{friend}," said the {fkind}. "[I am new here|I saw the {light} and followed it]. Do you want to play?"',
        "They played all day. [They climbed trees and built a hut|They ran races and threw stones into the water], and at "
        "noon they shared a {food}.",
        'When it grew dark, {hero} asked, "[Will you come again tomorrow|Can we meet again]?" "[Every day|Of course]," said '
        "{friend}.",
        'On the way home, {hero} looked up at the sky. ["Thank you," {he} whispered to the {light}|There was no {light} '
        "now, but {he} did not need one anymore].",
    ),
)

STORM = Plot(
    traits="brave clever helpful strong",
    weathers=ROUGH,
    tables=(NEIGHBORS,),
    lines=(
        "One {weather} {time}, {hero} and {friend} were on their way home. [Dark clouds came over the hill|The wind grew "
        "stronger and stronger], and soon there was thunder and lightning.",
        '"[We must find a roof|Quick, let us run]!" cried {friend}. They ran to the house of {who}, the {work}, and knocked '
        "at the door.",
        '"Come in, come in," said {who}. {Whe} gave them [dry clothes|a warm blanket] and a cup of [hot tea|hot milk]. '
        "[The fire was crackling|It was warm by the fire].",
        "All at once, there was a loud crash. [A tree had fallen on the roof of the {shop}|The storm had torn a hole in the "
        'roof of the {shop}]. {Who} turned pale. "[My {shop}|Oh no]!" {whe} said. "Now the rain will ruin everything."',
        '"[We will help you|You helped us, and now we help you]," said {hero}. {He} [held the ladder|fetched a bucket], and '
        "{friend} [brought boards and nails|carried everything to a dry corner]. They worked until the hole was closed.",
        "Then the storm was over. [A rainbow stood above the hills|The sun came out, and every leaf was shining]. {Who} "
        "[shook their hands|could not thank them enough].",
        "[{Hero} and {friend} came home late, wet and very happy|Since that day, {hero} and {friend} were always welcome at "
        "the {shop}].",
    ),
)

LETTER = Plot(
    traits="fast honest helpful cheerful",
    tables=(NEIGHBORS, WIDE_PLACES, COLORS),
    lines=(
        "One {weather} {time}, {hero} found a {color} letter {at}. [It was a little wet|The wind had dropped it there]. On it "
        "was the name of {who}, the {work}.",
        '"[This must be important|Somebody is waiting for this letter]," said {hero}. {He} [called {friend}|went to get '
        "{friend}], and together they [set out|went off] to find {whim}.",
        "The {shop} was on the other side of the {place}. They walked for {n} [hours|miles]. [{Friend} wanted to turn "
        "back|Their feet began to hurt], but {hero} [held the letter tight|would not give up].",
        'At last they [saw a light|came to the {shop}]. {Who} opened the door and looked at them with big eyes. "A letter for '
        'me?" {whe} asked. [{Whis} hands were shaking|{Whe} sat down].',
        '{Whe} opened it and read it [twice|three times]. Then {whe} began to [smile|laugh and cry at the same time]. "[My sister is coming '
        'home|My son is coming home|My old friend is coming to see me]," {whe} said. "I had almost lost hope."',
        "{Who} gave {hero} and {friend} [a whole bag of cookies|bread and honey], and [they stayed until evening|{whe} took them "
        "home in {whis} cart].",
        "[That is how one small {color} letter made three people happy|And {hero} thought that a letter is a very small thing "
        "that can carry a lot of joy].",
    ),
)

PLOTS: Mapping[str, Plot] = {
    "lost": LOST,
    "share": SHARE,
    "rescue": RESCUE,
    "count": COUNT,
    "fear": FEAR,
    "learn": LEARN,
    "plant": PLANT,
    "night": NIGHT,
    "build": BUILD,
    "gift": GIFT,
    "market": MARKET,
    "quarrel": QUARREL,
    "wish": WISH,
    "storm": STORM,
    "letter": LETTER,
}

OPENINGS = (
    "[Once upon a time, there was|There once was|Long ago, there was] a {trait} little {kind} named {hero}. "
    "[{He} lived {home} with {his} {elder}. |{He} lived {home}. |]",
    "{Hero} was a {trait} {kind} who lived {home}. ",
    "A {trait} {kind} named {hero} lived {home}. ",
    "[{Home}|Not far from here,] there lived a {trait} little {kind}. {His} name was {hero}. ",
    "",
)
"""How a story introduces its hero, or doesn't. The plot follows."""

FRIENDS = "[|{His} best friend was a {fkind} named {friend}. |Next door lived {friend}, who was a {fkind}. ]"
"""How it introduces the friend, in the plots where hero and friend know each other."""

STRANGERS = ("wish",)
"""Plots where they don't."""

# --- telling ------------------------------------------------------------------------------------------------------

FAVOR = 1.5
"""How much likelier earlier alternatives are: the first of two is drawn with probability 0.5 ** (1 / FAVOR) = 0.63."""

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_NAME = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU]|honest)")


def pick(rng: random.Random, options: Sequence[T], favor: float = FAVOR) -> T:
    """One of the options, the earlier ones more often; all alike with `favor` 1.

    It draws `rng.random()` alone, whose sequence for a seed Python promises to keep from version to version.
    """
    return options[int(len(options) * rng.random() ** favor)]


def story(rng: random.Random) -> str:
    """One story: a paragraph of about a hundred words, without a line break."""
    name = pick(rng, tuple(PLOTS), favor=1)
    plot = PLOTS[name]
    bound = _cast(rng) | _scene(rng, plot)
    opening = pick(rng, OPENINGS)
    friend = FRIENDS if opening and name not in STRANGERS else ""
    text = opening + friend + " ".join(plot.lines)
    return _ARTICLE.sub(r"\1n ", _fill(_choose(text, rng), bound))


def stories(count: int, *, seed: int) -> Iterator[str]:
    """`count` stories. Story number i depends on the seed and on i alone, on every machine.

    Args:
        count: how many.
        seed: another seed gives other stories of the same grammar.
    """
    for index in range(count):
        yield story(random.Random(f"{seed}/{index}"))


def _cast(rng: random.Random) -> dict[str, str]:
    """Who is in the story: names, kinds and pronouns of hero and friend, and an elder of the hero's."""
    hero, friend = _person(rng), _person(rng)
    while friend["name"] == hero["name"]:
        friend = _person(rng)
    bound = {"hero": hero["name"], "kind": hero["kind"], "home": hero["home"]}
    bound |= {key: hero[key] for key in ("he", "him", "his")}
    bound |= {"friend": friend["name"], "fkind": friend["kind"]}
    bound |= {f"f{key}": friend[key] for key in ("he", "him", "his")}
    return bound | pick(rng, ELDERS)


def _person(rng: random.Random) -> dict[str, str]:
    girl = rng.random() < 0.55
    person = {"name": pick(rng, GIRLS if girl else BOYS), **pick(rng, KINDS, favor=1)}
    if person["kind"] == "child":
        person["kind"] = "girl" if girl else "boy"
    pronouns = ("she", "her", "her") if girl else ("he", "him", "his")
    return person | dict(zip(("he", "him", "his"), pronouns, strict=True))


def _scene(rng: random.Random, plot: Plot) -> dict[str, str]:
    """What a plot needs beside its cast: weather, time, numbers and a row of each of its tables."""
    bound = {"trait": pick(rng, plot.traits.split()), **pick(rng, plot.weathers), **pick(rng, TIMES)}
    for rows in plot.tables:
        bound |= pick(rng, rows)
    whole = 3 + int(8 * rng.random())
    given = 1 + int((whole - 1) * rng.random() ** FAVOR)
    bound |= {"n": NUMBERS[whole], "k": NUMBERS[given], "rest": NUMBERS[whole - given]}
    for key, count in (("k", given), ("rest", whole - given)):
        bound[f"{key}_coins"] = "coin" if count == 1 else "coins"
        bound[f"{key}_is"] = "is" if count == 1 else "are"
        bound[f"{key}_fruit"] = bound.get("fruit_one" if count == 1 else "fruit", "")
    return bound


def _choose(text: str, rng: random.Random) -> str:
    """Replace every bracket by one of its alternatives, innermost first."""
    while "[" in text:
        text = _CHOICE.sub(lambda match: pick(rng, match[1].split("|")), text)
    return text


def _fill(text: str, bound: Mapping[str, str]) -> str:
    """Replace every `{name}`. A capital in the template gives one in the text."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in bound:
            return bound[name]
        word = bound[name[0].lower() + name[1:]]
        return word[0].upper() + word[1:]

    return _NAME.sub(value, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print stories of the corpus of opt-tiny.")
    parser.add_argument("--stories", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus (default: %(default)s)")
    arguments = parser.parse_args()
    for text in stories(arguments.stories, seed=arguments.seed):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
