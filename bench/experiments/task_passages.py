"""Questions, each with a passage that answers it in other words: what retrieval by embeddings is tried on."""

PASSAGES = (
    (
        "Why is the sky blue?",
        "Air molecules scatter short wavelengths of sunlight far more than long ones, so light of that hue reaches "
        "our eyes from all directions above.",
    ),
    (
        "What makes bread dough rise?",
        "Yeast eats the sugars in flour and gives off carbon dioxide. The gas is trapped in the gluten, and the loaf "
        "swells.",
    ),
    (
        "How do bees tell each other where flowers are?",
        "Back in the hive a forager performs a waggle dance, whose direction and length describe the way to nectar.",
    ),
    (
        "Who discovered penicillin?",
        "In 1928 Alexander Fleming noticed that a mould on a forgotten dish had killed the bacteria around it, which "
        "led to the first antibiotic.",
    ),
    (
        "Why do leaves change color in autumn?",
        "When days grow short, trees break down their chlorophyll. Yellow and orange pigments that were hidden all "
        "summer become visible.",
    ),
    (
        "What causes ocean tides?",
        "The pull of the moon, and to a lesser degree that of the sun, raises bulges of water that sweep around the "
        "turning Earth twice a day.",
    ),
    (
        "How does a refrigerator keep food cold?",
        "A liquid evaporates in pipes inside the cabinet and takes up heat; a compressor then squeezes the vapour, "
        "which releases that warmth at the back.",
    ),
    (
        "What is the purpose of red blood cells?",
        "They are packed with haemoglobin, a protein that picks up oxygen in the lungs and lets it go in the muscles "
        "and organs.",
    ),
    (
        "Why does iron rust?",
        "In damp surroundings the metal reacts with oxygen and forms a flaky brown oxide that falls off and exposes "
        "fresh surface.",
    ),
    (
        "How do vaccines protect people?",
        "A harmless piece of a germ is shown to the immune system in advance, which remembers it and answers quickly "
        "when the real one arrives.",
    ),
    (
        "What is a leap year for?",
        "A trip around the sun takes nearly six hours more than 365 days. One extra day in February every fourth "
        "calendar cycle makes up for it.",
    ),
    (
        "How is paper made?",
        "Wood chips are cooked into a pulp of fibres, spread on a screen with much water, pressed, and dried into thin "
        "sheets.",
    ),
    (
        "Why do cats purr?",
        "Muscles in the larynx twitch rapidly while the animal breathes in and out. It does so when content, but also "
        "to calm itself when hurt.",
    ),
    (
        "What did Johannes Gutenberg invent?",
        "Movable metal type, set by hand and inked in a press, let a German goldsmith of the fifteenth century produce "
        "books in hundreds of copies.",
    ),
    (
        "How do submarines dive and come up again?",
        "Tanks are flooded with sea water to make the vessel heavier; compressed air blows them empty so that it "
        "floats.",
    ),
    (
        "Which planet is the largest in the solar system?",
        "Jupiter, a giant ball of hydrogen and helium, has more than twice the mass of all other worlds around the sun "
        "put together.",
    ),
    (
        "What is photosynthesis?",
        "Green plants use light to turn water and carbon dioxide into sugar, and give off oxygen while they do.",
    ),
    (
        "Why do we see lightning before we hear thunder?",
        "The flash travels to us almost at once, while the rumble moves through air at only about 340 metres a second.",
    ),
    (
        "How does soap remove grease?",
        "Its molecules have one end that clings to fat and another that likes water, so that oily dirt is wrapped up "
        "in droplets and rinsed away.",
    ),
    (
        "Who was the first person to walk on the moon?",
        "Neil Armstrong stepped off the ladder of the lander Eagle in July 1969, while Michael Collins circled "
        "overhead.",
    ),
    (
        "What do earthworms do for a garden?",
        "By burrowing they loosen the soil and let air in, and what they leave behind feeds the roots of plants.",
    ),
    (
        "How is cheese produced?",
        "Milk is curdled with rennet or acid, the whey is drained off, and the solid curds are salted, pressed and "
        "left to ripen.",
    ),
    (
        "Why is the Dead Sea so salty?",
        "Rivers carry minerals into this lake in the desert, but nothing flows out; water only leaves by evaporation, "
        "so the brine grows ever stronger.",
    ),
    (
        "What is an eclipse of the sun?",
        "Now and then the moon passes exactly between us and our star, and its shadow turns day into dusk for a few "
        "minutes.",
    ),
    (
        "How do glasses correct short sight?",
        "Lenses that are thinner in the middle spread the rays a little, so that they meet on the retina instead of in "
        "front of it.",
    ),
    (
        "What is the longest river in South America?",
        "From the Peruvian Andes the Amazon winds more than six thousand kilometres to the Atlantic, fed by over a "
        "thousand tributaries.",
    ),
    (
        "Why do birds migrate?",
        "Insects and seeds become scarce in winter. Flying to warmer regions, and back in spring, gives many species "
        "enough to eat all year.",
    ),
    (
        "How does a compass work?",
        "A magnetised needle turns freely until it lines up with the field of the Earth, one tip towards north.",
    ),
    (
        "Who painted the Mona Lisa?",
        "Leonardo da Vinci worked for years on this small portrait of a Florentine merchant's wife, which hangs in the "
        "Louvre.",
    ),
    (
        "What happens during hibernation?",
        "Hedgehogs and marmots sleep through the cold months with a slow heartbeat and a low body temperature, living "
        "on stored fat.",
    ),
    (
        "How do volcanoes form?",
        "Where plates of the crust part or collide, molten rock from below finds a way up, and layer upon layer of "
        "lava and ash builds a cone.",
    ),
    (
        "Why does ice float?",
        "Water expands when it freezes, because its molecules settle into an open lattice, so the solid is lighter "
        "than the liquid beneath.",
    ),
    (
        "What is the job of the kidneys?",
        "This pair of organs filters waste and surplus salt from the blood and sends them off as urine.",
    ),
    (
        "How was the Grand Canyon made?",
        "Over millions of years the Colorado River cut down through layers of rising rock, and wind and frost widened "
        "the gorge.",
    ),
    (
        "What does a conductor do in an orchestra?",
        "With a baton the maestro sets the tempo, shows when sections enter, and shapes how loud and how long the "
        "musicians play.",
    ),
    (
        "Why do onions make us cry?",
        "Cutting the bulb lets two substances meet and form a sulphur gas, which stings the eyes until tears wash it "
        "out.",
    ),
    (
        "How do fish breathe under water?",
        "They draw water over their gills, where thin, blood-filled sheets take up the oxygen dissolved in it.",
    ),
    (
        "What is inflation in an economy?",
        "Prices in general go up from year to year, so that the same banknote buys fewer goods than it used to.",
    ),
    (
        "Who wrote Romeo and Juliet?",
        "William Shakespeare put the two lovers from feuding families of Verona on a London stage in the 1590s.",
    ),
    (
        "How does a microwave oven heat food?",
        "Waves of a high frequency make water molecules turn to and fro, and their jostling warms the meal from "
        "within.",
    ),
    (
        "Why is the Great Wall of China there?",
        "Several dynasties built and rebuilt long fortifications along the northern frontier to keep out mounted "
        "raiders from the steppe.",
    ),
    (
        "What do bats use echoes for?",
        "In complete darkness they emit calls too high for human ears and judge from what returns where moths and "
        "branches are.",
    ),
    (
        "How are pearls created?",
        "When something irritating gets inside an oyster's shell, the animal coats it with layer after layer of shiny "
        "nacre.",
    ),
    (
        "What is a prime number?",
        "A whole figure above one, such as 7 or 13, that can be divided evenly only by itself and by one.",
    ),
    (
        "Why do bridges have expansion joints?",
        "Steel and concrete grow longer on hot days and shrink in frost; gaps in the deck leave room for that.",
    ),
    (
        "How does a bicycle pump work?",
        "Pushing the handle squeezes the air in a cylinder until a valve opens and lets it into the tyre.",
    ),
    (
        "What is the function of roots?",
        "Below the ground they anchor a tree and suck up moisture together with dissolved nutrients.",
    ),
    (
        "Who was Marie Curie?",
        "Born in Warsaw, this physicist and chemist isolated radium and is still the only woman with two Nobel prizes.",
    ),
    (
        "Why do deserts get cold at night?",
        "With hardly any clouds or moisture to hold it back, the heat that sand has gathered by day escapes quickly to "
        "the open sky.",
    ),
    (
        "How do spiders make their webs?",
        "Glands in the abdomen release liquid silk that hardens to a thread; the animal spans a frame first and then "
        "lays a sticky spiral.",
    ),
    (
        "What is the difference between weather and climate?",
        "One describes rain, wind and sunshine on a certain day, the other what is usual in a region over decades.",
    ),
    (
        "Why were the pyramids of Egypt built?",
        "Pharaohs had these mountains of limestone raised as tombs, meant to guard their bodies and treasure for the "
        "afterlife.",
    ),
    (
        "How does a computer store numbers?",
        "Everything is kept as rows of bits, each of them on or off, and a row of eight can hold values from 0 to 255.",
    ),
    (
        "What is jet lag?",
        "After a long flight across time zones the body's inner clock still follows home, and travellers lie awake at "
        "midnight and yawn at noon.",
    ),
    (
        "Why does a chameleon change its appearance?",
        "Tiny crystals in the skin of this lizard shift with mood and temperature, and with them the hues that rivals "
        "and mates get to see.",
    ),
    (
        "How is glass manufactured?",
        "Sand is melted together with soda and lime at about 1500 degrees, then blown, pressed or floated on liquid "
        "tin.",
    ),
    (
        "What did Charles Darwin propose?",
        "Creatures that happen to fit their surroundings leave more offspring, so over many generations species slowly "
        "turn into new ones.",
    ),
    (
        "Why do astronauts float in a space station?",
        "Crew and vessel fall around the planet together all the time, and nothing presses them against the floor.",
    ),
    (
        "How do traffic lights know that a car is waiting?",
        "A loop of wire under the asphalt senses the metal of a vehicle standing above it and asks the controller for "
        "green.",
    ),
    (
        "What is sourdough?",
        "Flour and water left to stand catch wild yeasts and lactic bacteria, a culture that bakers feed daily and use "
        "instead of bought leaven.",
    ),
)
