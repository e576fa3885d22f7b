"""The words needle keys are made of: our own lists, cut into a training and a held-out half.

The halves share no word, so a report on held-out keys measures reading, not remembered keys.
"""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "heldout"]

_ADJECTIVES = """
able absent agile airy alert aloof amber ample ancient angular aquatic arid ashen astute austere
autumnal awake azure balanced balmy barren bashful bleak blissful blunt boastful bold boundless
brackish brave brazen breezy brief bright brisk brittle broad bronze bumpy buoyant bustling calm
candid careful cautious cheerful chilly chunky civil classic clean clever cloudy clumsy coarse
cobalt coastal compact cordial cosmic cozy crafty creamy crimson crisp crooked curious curly cyclic
damp dapper daring dashing dazzling decent deep definite delicate dense devout dim discreet distant
dizzy docile drafty dreamy drowsy dusky dusty eager early earnest earthy elastic elegant elfin
emerald eminent endless epic equal errant even exact exotic fabled faint fair faithful famous fancy
feathery fertile festive fierce fiery fleeting floral fluent flying foamy fond formal fragile
fragrant frank fresh frosty frugal fuzzy gallant gaudy gentle giant gifted gilded glad gleaming
glossy golden graceful grand grateful gravelly green gritty gusty handy hardy hasty hazy hearty
heavy hidden hoarse hollow honest humble humid icy idle immense inland inner ivory jaunty jolly
jovial joyful keen kind knotty lavish leafy lean level light lilac limber lively lofty lonely loud
loyal lucid lunar lush majestic marbled mellow merry mighty mild misty modest mossy muddy murky mute
narrow nasal native neat nimble noble nocturnal northern novel oaken obedient oblong odd olive opal
open orange ornate outer oval pale patient pearly pensive petite placid plain playful pleasant
plucky plush polar polite porous potent precise pretty prim prompt proud prudent quaint quick quiet
radiant rainy rapid rare ready regal remote rich rigid ripe robust rosy rotund rough royal rugged
rural rustic rusty sacred sandy savory scarlet scenic secret serene shady sharp shiny shy silent
silky silver simple sincere sleek sleepy slender smoky smooth snowy sober soft solar solemn solid
somber sonic sparse speckled spicy spiral splendid spry square stable starry stately steady steep
stellar stern stony stormy strict striped sturdy subtle sudden sunny supple swift tactful tame tangy
tart tawny tender tepid thorny thrifty tidal tidy timid tiny tranquil tropical trusty tufted twin
umber upbeat upper urban useful valiant vast velvet vibrant violet vivid warm wary watchful wavy
weary western whimsical wide wild windy wintry wise witty wooden woolly worthy yearly yellow young
zealous zesty
"""

_NOUNS = """
abacus acorn acrobat airship alcove almanac altar amulet anchor antler anvil apricot apron aqueduct
arbor archer ark armor arrow atlas attic aurora awning axle badger bagpipe bakery balcony ballad
bamboo banjo banner barge barley barn barrel basin basket bassoon bayou beacon beaver beetle bell
bellows birch biscuit bison blanket blossom boat bonfire bonnet bookcase boulder bouquet bramble
breeze brick bridge brook broom bucket buckle buffalo bugle burrow button cabin cactus camel candle
canoe canvas canyon caravan cargo carpet carriage cascade castle cavern cedar cellar cello chalet
chalk chapel chariot cherry chestnut chimney chisel cinder citadel clarinet cliff cloak clock clover
coach cobbler cobweb compass copper coral cottage cradle crane crater creek crest cricket crown
crystal cupboard curtain cymbal cypress dahlia daisy dagger dairy deer delta desert dolphin donkey
doorway dove dragon drum dune eagle easel echo ember engine envelope estuary falcon farm feather
fence fern ferry fiddle fig finch fjord flagon flask flute forest forge fortress fossil fountain fox
furnace galaxy galleon garden garnet gate gazelle geyser ginger giraffe glacier glove goblet gondola
goose gorge granary granite grove guitar hammer hammock harbor harp harvest hatchet hawk hazel
hearth hedge helmet heron hill hive hollyhock honey horizon horn hornet hourglass iceberg igloo
inkwell inn iris island jacket jackal jar jasmine javelin jewel jungle juniper kayak kernel kettle
keyhole kiln kingdom kite kitten ladder ladle lagoon lake lantern larch lark lattice laurel lava
ledger lemon lens leopard library lichen lighthouse lily linen lizard llama locket loom lute lynx
magnet magpie mandolin mango manor mantle maple marble market marsh mask meadow medal melon meteor
mill mirror moat monsoon moon moor mosaic moth mountain mural museum napkin nebula nectar needle
nest nettle notebook nutmeg oak oasis oboe ocean onyx orbit orchard orchid organ otter oven owl
oxcart oyster paddle pagoda palace palm panther papaya parasol parchment parrot pasture pavilion
peach peacock pear pebble pelican pendant pepper petal piano pigeon pillar pillow pine pirate planet
plateau plaza plow plum pocket pond poppy porch portrait prairie prism pulley pumpkin puppet pyramid
quail quarry quill quilt rabbit raft rampart ranch raven reef ribbon ridge river robin rocket rope
rudder saddle saffron sail salmon sandal sapphire satchel scarf scepter schooner scroll seal
shepherd shield shovel shrine sickle skylark sled sparrow spindle spruce stable statue steeple
stream sundial swallow swan tablet tavern teapot temple thicket thimble thistle tiger timber torch
tower trellis trumpet tulip tunnel turtle valley vase vessel village vineyard viola violin volcano
wagon walnut walrus waterfall weasel wharf wheat wheel willow windmill window wolf wren yacht zebra
zephyr zither
"""


def _half(words: str, split: Split) -> tuple[str, ...]:
    unique = sorted(set(words.split()))
    return tuple(unique[0 if split == "train" else 1 :: 2])


ADJECTIVES: dict[Split, tuple[str, ...]] = {
    "train": _half(_ADJECTIVES, "train"),
    "heldout": _half(_ADJECTIVES, "heldout"),
}
"""Adjectives by split; alternating words of the sorted list, so the halves are alike."""

NOUNS: dict[Split, tuple[str, ...]] = {
    "train": _half(_NOUNS, "train"),
    "heldout": _half(_NOUNS, "heldout"),
}
"""Nouns by split."""
