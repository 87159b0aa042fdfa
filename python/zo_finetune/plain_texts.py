"""Twenty paragraphs of plain English about anything but films, written for this package: what a model is asked for beside its task.

Belongs here: the texts. Does not belong here: what is measured on them (beside.py).
"""

TEXTS = (
    "Bread needs four things: flour, water, salt and time. The dough is mixed in the evening and left in a cool room, where it rises slowly until the "
    "morning. Whoever is in a hurry can use more yeast, but the crust will be pale and the taste will be flat.",
    "The river rises in the hills behind the village and runs north for about ninety miles before it reaches the sea. In spring, when the snow melts, "
    "it floods the lower fields, and the farmers move their sheep to the other side of the road.",
    "To change a tyre, park on level ground and pull the handbrake. Loosen the nuts a little while the wheel still touches the road, then lift the car "
    "with the jack, take the nuts off and pull the wheel towards you.",
    "A prime number has no divisors except one and itself. There are infinitely many of them, as Euclid showed: multiply any list of primes together and "
    "add one, and the result has a prime factor that was not in the list.",
    "The library opens at nine and closes at six, except on Thursdays, when it stays open until eight. Books may be kept for three weeks. If nobody else "
    "has asked for a book, you can renew it twice by telephone.",
    "Bees tell each other where flowers are by dancing. The direction of the dance gives the angle to the sun, and its length gives the distance. A bee "
    "that has followed the dance flies out and finds the place on its own.",
    "My grandfather worked on the railway for forty years. He knew the name of every station between the coast and the capital, and when he could not "
    "sleep at night he would recite them, first in one direction and then in the other.",
    "Water boils at a lower temperature in the mountains because the air presses on it less. At three thousand metres it boils at about ninety degrees, "
    "so that potatoes take longer to cook, however hot the fire is.",
    "The committee met on Monday to discuss the new bridge. The engineers explained that the old one could carry no more lorries after the end of the "
    "year, and the treasurer asked where the money would come from. No decision was taken.",
    "Plant the bulbs in October, about three times as deep as they are high, with the pointed end up. Water them once and then leave them alone. The "
    "first leaves will show in February, and the flowers a month later.",
    "The moon has no light of its own. We see the part of it that the sun shines on, and since the moon goes around the earth once a month, that part "
    "grows from a thin crescent to a full circle and shrinks again.",
    "She packed two shirts, a pair of boots, a map and a small knife, and left the house before anyone was awake. By noon she had reached the pass. From "
    "there she could see the whole valley, with the lake in the middle like a coin.",
    "Interest is the price of borrowed money. If you borrow a hundred pounds at five per cent and pay nothing back, you owe a hundred and five after one "
    "year, and after two years a little more than a hundred and ten, since interest is charged on interest.",
    "The heart is a pump with four chambers. The right side sends blood to the lungs, where it takes up oxygen, and the left side sends it to the rest of "
    "the body. Valves between the chambers keep it from flowing back.",
    "In chess each player begins with sixteen pieces. The queen is the strongest of them, since she moves any number of squares in any direction, but the "
    "game is lost with the king, who moves only one square at a time.",
    "Please note that the lift is out of order until Wednesday. Visitors with heavy luggage should use the entrance at the back of the building, where "
    "the porter will help them. We are sorry for the inconvenience.",
    "Iron rusts when it is wet and air can reach it. Paint keeps both away, and so does a thin layer of zinc, which is eaten first even where it is "
    "scratched. On dry shelves a tool can lie for a hundred years and look new.",
    "The two brothers divided the land between them. The elder took the meadow by the stream, and the younger took the wood on the hill, and for a year "
    "they did not speak. Then the stream dried up, and they had to share the well.",
    "A compiler reads a program as text and turns it into instructions for a machine. It first splits the text into words, then finds out how they belong "
    "together, and in the end chooses instructions that do the same in less time.",
    "Trains to the airport leave every twenty minutes from platform four. The journey takes half an hour. Tickets can be bought from the machines in the "
    "hall or from the conductor, who charges a small fee for it.",
)
