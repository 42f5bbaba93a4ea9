"""A person in a pose: where the joints are, and the parts from far to near."""

from __future__ import annotations

import math

from .paint import Painter, Piece, Point, crescent, ellipse, hull, limb, mix, polygon
from .world import Person, Pose

_ARM = 0.15  # length of the upper arm


class Figure:
    """Puts a person together; ``paint`` leaves the figure on the painter's canvas.

    Of the body's own directions, lateral shows as x times cos(yaw) and forward as x times sin(yaw).
    """

    def __init__(self, painter: Painter, person: Person, pose: Pose) -> None:
        self.paint_part, self.person, self.pose = painter.paint, person, pose
        self.cos, self.sin = math.cos(pose.yaw), math.sin(pose.yaw)
        self.width = math.hypot(self.cos, 0.62 * self.sin)  # a body is 0.62 as deep as it is wide

    def x(self, lateral: float, forward: float = 0.0) -> float:
        return lateral * self.cos + forward * self.sin

    def paint(self) -> None:
        bag, back = self.person.bag, self.pose.back
        far = -1 if self.sin < 0 else 1
        if not back:
            self.mane()
            if bag == "backpack":
                self.backpack(0.86)
        self.arm(far, 0.84)
        self.leg(far, 0.84)
        self.leg(-far, 1.0)
        self.hips()
        self.torso()
        if bag == "backpack":
            self.backpack(1.0) if back else self.straps()
        elif bag == "satchel":
            self.satchel()
        self.arm(-far, 0.95)
        self.head()
        if back:
            self.mane()

    def phase(self, side: int) -> float:
        return self.pose.phase + (math.pi if side > 0 else 0.0)

    def leg(self, side: int, light: float) -> None:
        person, paint = self.person, self.paint_part
        length = 0.5 * (0.955 - person.crotch)  # of the thigh, and of the shin
        swing = 0.4 * math.sin(self.phase(side))
        shin = swing - 0.5 * max(0.0, math.cos(self.phase(side)))  # the knee bends one way
        hip = (self.x(side * 0.46 * person.hip), person.crotch - 0.01)
        knee = (hip[0] + self.x(0, length * math.sin(swing)), hip[1] + length * math.cos(swing))
        ankle = (knee[0] + self.x(0, length * math.sin(shin)), knee[1] + length * math.cos(shin))
        thick = 0.5 + 0.5 * person.limb
        r_hip, r_knee, r_ankle = 0.047 * thick, 0.034 * thick, 0.021 * thick
        upper, lower = limb(hip, knee, r_hip, r_knee), limb(knee, ankle, r_knee, r_ankle)
        paint(person.skin, upper, lower, light=light)

        heel = (ankle[0], ankle[1] + 0.012)
        toe = (ankle[0] + self.x(side * 0.012, 0.05), ankle[1] + 0.016 + 0.012 * max(self.cos, 0))
        shoe = [limb(heel, toe, 0.025, 0.019)]
        if person.boot:
            shoe.append(limb(mix(ankle, knee, person.boot), ankle, 0.028 * thick + 0.004, 0.027))
        paint(person.shoes, *shoe, light=light)

        if person.cut == "skirt":
            return
        end = mix(hip, knee, min(1.0, 2 * person.length))
        r_end = r_knee * (1.02 + 0.2 * person.flare) if person.length > 0.5 else r_hip
        legging = [limb(hip, end, r_hip * 1.08, r_end)]
        if person.length > 0.5:
            hem = mix(knee, ankle, 2 * person.length - 1)
            r_hem = (r_ankle + 0.006) * person.flare + 0.004
            legging.append(limb(knee, hem, r_end, r_hem, origin=mix(knee, ankle, -1.0)))
        paint(person.bottom, *legging, light=light)

    def hips(self) -> None:
        person = self.person
        hip, half = person.crotch - 0.03, person.hip * self.width
        shape = [(0.44, person.waist * self.width), (hip, half)]
        if person.cut == "skirt":
            sway = 0.02 * abs(math.sin(self.phase(1)) * self.sin)
            hem = hip + person.length * (0.93 - hip)
            shape.append((hem, half * (0.7 + 0.4 * person.flare) + sway))
        else:
            shape.append((hip + 0.05, half * 0.86))
        self.paint_part(person.bottom, hull(shape), girth=1.1 * half)

    def outline(self) -> list[Point]:
        """(y, half width) of the dressed trunk, from the collar to the hem."""
        person = self.person
        chest, hip = 0.5 * (person.shoulder + person.waist) + 0.006, person.hip + 0.006
        shape = [(0.165, 0.03), (0.183, 0.62 * person.shoulder), (0.21, 0.98 * person.shoulder)]
        shape += [(0.3, chest), (0.42, person.waist + 0.004)]
        if person.hem > 0.53:
            shape.append((0.51, hip))
        shape.append((person.hem, hip * person.hem_width))
        return [(y, half * self.width) for y, half in shape]

    def torso(self) -> None:
        person, paint = self.person, self.paint_part
        paint(person.skin, limb((0, 0.12), (0, 0.18), 0.025, 0.03), light=0.9)
        shape = self.outline()
        paint(person.top, hull(shape, top=0.17), girth=1.12 * person.shoulder * self.width)
        if self.pose.back:
            return
        turned = 0.35 * self.sin  # the middle of the front, as a share of the half width
        if person.inner is not None:
            paint(person.inner, hull(shape, left=turned - 0.3, right=turned + 0.3))
        x = 0.05 * turned
        if person.collar == "vee":
            paint(person.skin, polygon((x - 0.035, 0.168), (x + 0.035, 0.168), (x, 0.235)))
        elif person.collar == "round":
            paint(person.skin, ellipse((x, 0.168), 0.034, 0.022, 0, 1))

    def arm(self, side: int, light: float) -> None:
        person, paint = self.person, self.paint_part
        swing = -0.42 * math.sin(self.phase(side))
        splay = side * (0.1 + 0.05 * person.limb) * _ARM
        shoulder = (self.x(side * 0.86 * person.shoulder), 0.213)
        x, y = self.x(splay, _ARM * math.sin(swing)), _ARM * math.cos(swing)
        elbow = (shoulder[0] + x, shoulder[1] + y)
        x, y = self.x(0, _ARM * math.sin(swing + 0.35)), 0.95 * _ARM * math.cos(swing + 0.35)
        wrist = (elbow[0] + x, elbow[1] + y)
        hand = mix(elbow, wrist, 1.1)
        r_top, r_elbow, r_wrist = 0.031 * person.limb, 0.024 * person.limb, 0.017
        bare = [limb(shoulder, elbow, r_top, r_elbow), limb(elbow, wrist, r_elbow, r_wrist)]
        paint(person.skin, *bare, ellipse(hand, 0.02, 0.025), light=light)
        if person.bag == "tote" and side == person.bag_side:
            self.tote(hand, light)
        if not person.sleeve:
            return
        end = mix(shoulder, elbow, min(1.0, 2 * person.sleeve))
        sleeve = [limb(shoulder, end, r_top + 0.006, r_elbow + 0.007)]
        if person.sleeve > 0.5:
            cuff = mix(elbow, wrist, 2 * person.sleeve - 1)
            start = mix(elbow, wrist, -1.0)
            sleeve.append(limb(elbow, cuff, r_elbow + 0.007, 0.025, origin=start))
        paint(person.top, *sleeve, light=light)

    def backpack(self, light: float) -> None:
        size, x = self.person.bag_size, self.x(0, -0.085)
        half = 0.088 * size * (0.35 + 0.65 * abs(self.cos)) + 0.02
        low = 0.21 + 0.22 * size
        shape = [(0.19, 0.7 * half), (0.23, half), (low - 0.03, 1.05 * half), (low, 0.8 * half)]
        self.paint_part(self.person.bag_cloth, hull(shape, x), light=light)
        if self.pose.back:
            pocket = hull([(low - 0.1 * size, 0.7 * half), (low - 0.02, 0.7 * half)], x, top=0.19)
            self.paint_part(self.person.bag_cloth, pocket, light=0.85)

    def straps(self) -> None:
        for side in (-1, 1):
            top, end = (self.x(side * 0.055, 0.03), 0.185), (self.x(side * 0.075), 0.34)
            self.paint_part(self.person.bag_cloth, limb(top, end, 0.011, 0.01), light=0.9)

    def satchel(self) -> None:
        person, side, size = self.person, self.person.bag_side, self.person.bag_size
        x, cloth = self.x(side * (person.hip + 0.02)), person.bag_cloth
        half, low = 0.062 * size, 0.5 + 0.05 * size
        self.paint_part(cloth, limb((self.x(-side * 0.07), 0.185), (x, 0.46), 0.009, 0.009))
        self.paint_part(cloth, hull([(0.45, half), (low, 1.05 * half)], x))
        self.paint_part(cloth, hull([(0.447, 1.05 * half), (0.48, half)], x), light=0.8)

    def tote(self, hand: Point, light: float) -> None:
        size, (x, y) = self.person.bag_size, hand
        handles = [limb(hand, (x + dx, y + 0.06), 0.005, 0.005) for dx in (-0.03, 0.03)]
        body = hull([(y + 0.055, 0.05 * size), (y + 0.06 + 0.12 * size, 0.06 * size)], x)
        self.paint_part(self.person.bag_cloth, *handles, body, light=light)

    def mane(self) -> None:
        """The hair, or hood, that hangs behind the head; seen from behind it is over the back."""
        person, size, x = self.person, self.person.head, self.x(0, -0.012)

        def fall(*outline: Point) -> Piece:
            return hull([(y, half * size) for y, half in outline], x)

        manes = {
            "long": fall((0.02, 0.035), (0.07, 0.06), (0.15, 0.066), (0.26, 0.058)),
            "bob": fall((0.02, 0.035), (0.07, 0.06), (0.12, 0.068), (0.155, 0.062)),
            "afro": ellipse((x, 0.062), 0.078 * size, 0.068),
            "pony": limb((self.x(0, -0.045), 0.06), (self.x(0, -0.07), 0.21), 0.018, 0.012),
            "hood": ellipse((x, 0.09), 0.066 * size, 0.085),
        }
        if person.hair in manes:
            cloth = person.top if person.hair == "hood" else person.hair_cloth
            self.paint_part(cloth, manes[person.hair], light=0.92)

    def head(self) -> None:
        person, paint, style = self.person, self.paint_part, self.person.hair
        x, y, rx, ry = self.x(0, 0.014), 0.078, 0.047 * person.head, 0.06 * person.head
        hair = {"hood": person.top, "cap": person.bag_cloth, "beanie": person.bag_cloth}.get(
            style, person.hair_cloth
        )
        if person.collar in ("high", "scarf"):
            cloth = person.bag_cloth if person.collar == "scarf" else person.top
            paint(cloth, limb((-0.03, 0.16), (0.03, 0.16), 0.021, 0.021), light=0.92)
        paint(person.skin, ellipse((x, y), rx, ry))
        if self.pose.back:
            if style != "bald":
                paint(hair, ellipse((x, y - 0.006), 1.06 * rx, ry), light=0.95)
        else:
            for side in (-1, 1):
                eye = (x + self.x(side * 0.018 * person.head, 0.03), y + 0.006)
                paint(person.skin, ellipse(eye, 0.003, 0.004), light=0.35)
            low = {"crop": 0.25, "bald": 0.0, "hood": 0.2}.get(style, 0.32)
            if low:
                paint(hair, crescent((x, y - 0.004), 1.07 * rx, 1.07 * ry, low))
        if style == "bun":
            paint(hair, ellipse((x - 0.01 * self.sin, 0.012), 0.026, 0.022))
        elif style == "cap" and not self.pose.back:
            left, right = (x - 0.8 * rx, 0.06), (x + 0.8 * rx + 0.05 * self.sin, 0.062)
            paint(hair, limb(left, right, 0.009, 0.009), light=0.8)
