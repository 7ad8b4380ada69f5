"""The class names of COCO and ADE20K, in the order that models are trained with. Knows no model."""

from __future__ import annotations

COCO_CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave,
    oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
    toothbrush""".replace("\n    ", " ").split(", ")
)

_UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
# The `category_id` of each COCO class in the data set's own JSON: 1..90 with gaps.
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in _UNUSED_COCO_IDS)

ADE20K_CLASSES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
    mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base,
    box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator,
    grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge,
    bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm,
    kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck,
    tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole,
    land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle,
    oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag""".replace("\n    ", " ").split(", ")
)
