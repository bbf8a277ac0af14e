#include "overworld/prompt.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <set>
#include <span>

#include "overworld/rng.h"

namespace longtake::overworld {

namespace {

constexpr uint64_t kPromptStream = 0x5052;

using Words = std::span<const std::string_view>;

// Phrases per property. The first word of `kThemeKeys[theme]` and so on that parse_prompt finds
// decides, so no key may occur in the phrases of another value, in a sentence that does not matter,
// or in the templates.
constexpr std::string_view kSummer[] = {"summer", "green summer", "sunny", "lush summer",
                                        "warm and sunny"};
constexpr std::string_view kAutumn[] = {"autumn", "red autumn", "autumnal", "golden autumn",
                                        "russet"};
constexpr std::string_view kWinter[] = {"winter", "white winter", "snowy", "frozen", "icy"};
constexpr std::string_view kDesert[] = {"desert", "yellow desert", "sandy", "dusty desert", "arid"};
constexpr std::string_view kAlien[] = {"alien", "purple alien", "otherworldly", "strange alien",
                                       "extraterrestrial"};
constexpr std::string_view kCandy[] = {"candy", "pink candy", "sugary", "sweet candy",
                                       "chocolate and candy"};
constexpr std::string_view kVolcanic[] = {"volcanic", "black volcanic", "fiery", "burning",
                                          "charred volcanic"};
constexpr std::string_view kNight[] = {"night", "dark blue night", "moonlit", "midnight",
                                       "nocturnal"};
constexpr std::array<Words, kNumThemes> kThemePhrases = {kSummer, kAutumn, kWinter,   kDesert,
                                                         kAlien,  kCandy,  kVolcanic, kNight};

constexpr std::string_view kSummerKeys[] = {"summer", "summery", "sunny", "lush"};
constexpr std::string_view kAutumnKeys[] = {"autumn", "autumnal", "russet"};
constexpr std::string_view kWinterKeys[] = {"winter", "wintry", "snowy", "snow",
                                            "frozen", "icy",    "ice"};
constexpr std::string_view kDesertKeys[] = {"desert", "sandy", "sand", "arid", "cactus", "dunes"};
constexpr std::string_view kAlienKeys[] = {"alien", "otherworldly", "extraterrestrial",
                                           "mushrooms"};
constexpr std::string_view kCandyKeys[] = {"candy",  "sugary",    "sugar",    "sweet",
                                           "sweets", "chocolate", "lollipops"};
constexpr std::string_view kVolcanicKeys[] = {"volcanic", "volcano", "lava",
                                              "fiery",    "burning", "charred"};
constexpr std::string_view kNightKeys[] = {"night", "moonlit", "midnight", "nocturnal",
                                           "moonlight"};
constexpr std::array<Words, kNumThemes> kThemeKeys = {kSummerKeys,   kAutumnKeys, kWinterKeys,
                                                      kDesertKeys,   kAlienKeys,  kCandyKeys,
                                                      kVolcanicKeys, kNightKeys};

constexpr std::string_view kDry[] = {"almost no water", "hardly any water", "very little water"};
constexpr std::string_view kLakes[] = {"some lakes", "a few lakes", "scattered lakes",
                                       "several ponds"};
constexpr std::string_view kIslands[] = {"large seas and islands", "wide seas", "many islands",
                                         "a great sea with islands"};
constexpr std::array<Words, kNumSeas> kSeaPhrases = {kDry, kLakes, kIslands};

constexpr std::string_view kDryKeys[] = {"water"};
constexpr std::string_view kLakesKeys[] = {"lake", "lakes", "pond", "ponds"};
constexpr std::string_view kIslandsKeys[] = {"sea", "seas", "ocean", "oceans", "island", "islands"};
constexpr std::array<Words, kNumSeas> kSeaKeys = {kDryKeys, kLakesKeys, kIslandsKeys};

constexpr std::string_view kOpen[] = {"open fields", "wide open plains", "hardly any trees",
                                      "few trees"};
constexpr std::string_view kWoods[] = {"scattered woods", "some woods", "small groves",
                                       "light woodland"};
constexpr std::string_view kDense[] = {"dense forest", "thick forest", "deep forests",
                                       "a vast jungle"};
constexpr std::array<Words, kNumForests> kForestPhrases = {kOpen, kWoods, kDense};

constexpr std::string_view kOpenKeys[] = {"open", "fields", "plains", "trees"};
constexpr std::string_view kWoodsKeys[] = {"wood", "woods", "woodland", "grove", "groves"};
constexpr std::string_view kDenseKeys[] = {"forest", "forests", "forested", "jungle"};
constexpr std::array<Words, kNumForests> kForestKeys = {kOpenKeys, kWoodsKeys, kDenseKeys};

constexpr std::string_view kClearSky[] = {"the sky is clear .", "there is a cloudless sky .",
                                          "no clouds are in sight , the sky is clear ."};
constexpr std::string_view kSoftClouds[] = {"soft cloud shadows drift over the ground .",
                                            "soft clouds pass slowly overhead ."};
constexpr std::string_view kHeavyClouds[] = {"heavy cloud shadows move quickly over the ground .",
                                             "heavy clouds race overhead ."};
constexpr std::array<Words, kNumWeathers> kWeatherSentences = {kClearSky, kSoftClouds,
                                                               kHeavyClouds};

constexpr std::string_view kClearKeys[] = {"clear", "cloudless"};
constexpr std::string_view kSoftKeys[] = {"soft"};
constexpr std::string_view kHeavyKeys[] = {"heavy", "stormy", "cloudy"};
constexpr std::array<Words, kNumWeathers> kWeatherKeys = {kClearKeys, kSoftKeys, kHeavyKeys};

constexpr std::string_view kLandNouns[] = {"land", "country", "landscape", "realm", "region"};

constexpr std::string_view kMiddleNames[] = {"middle", "centre", "center", "heart"};

// {the} place, {T} theme and noun with their article, {F} forest, {S} sea, {L} landmark with its
// colour and article.
constexpr std::string_view kRegionTemplates[] = {
    "in {the} there is {T} with {F} and {S} , and {L} stands there .",
    "in {the} there is {T} . it has {S} and {F} . {L} marks the way .",
    "{the} is {T} with {S} and {F} , where {L} can be seen .",
    "{the} is {T} . one finds {F} , {S} and {L} there .",
    "{T} lies in {the} , with {F} , {S} and {L} .",
    "{T} fills {the} . it is known for {L} , {S} and {F} .",
    "towards {the} you come to {T} with {L} , {F} and {S} .",
    "people of {the} live in {T} near {L} , with {S} and {F} around them .",
};

constexpr std::string_view kOneLandTemplates[] = {
    "{T} with {F} , {S} and {L} .",
    "{T} with {S} and {F} , where {L} stands .",
    "this is {T} . it has {F} , {S} and {L} .",
    "a view of {T} with {L} , {F} and {S} .",
    "{T} with {F} and {L} .",
    "{T} with {S} and {L} .",
    "{T} with {F} and {S} .",
    "{T} with {L} .",
    "{T} .",
};

constexpr std::string_view kIdleSentences[] = {
    "the makers of this map left no written records behind .",
    "an old traveller once drew it on the back of a letter .",
    "nobody remembers who lit the first lamp here .",
    "music is said to be heard on quiet evenings .",
    "a careful visitor counts every step and every turn .",
    "coffee was once traded here for salt and rope .",
    "the camera moves slowly and looks straight down .",
    "there is no hurry and no danger in this scene .",
    "the picture should look sharp , steady and consistent over time .",
    "keep the same places identical when they are seen again .",
    "children play a game of hide and seek in the early afternoon .",
    "a clock can be heard but it is never seen .",
    "the lesson of the day is patience .",
    "roads lead from house to house , and bridges cross the rivers .",
    "little houses with coloured roofs line the way .",
    "small animals wander about in circles .",
    "the last letter took nine weeks to arrive .",
    "some say that the wind knows every name .",
    "a baker gets up before anyone else .",
    "the old songs have more verses than anyone can sing .",
    "every stone here was carried by hand .",
    "a long walk is the best way to learn it by memory .",
    "nothing is for sale , but much is given away .",
    "it is a view from above , drawn with care and in bright colours .",
    "the best stories are told while walking .",
};

// Words that no template needs but that a person may type.
constexpr std::string_view kExtraWords[] = {
    "also",      "always",    "an",        "any",       "are",        "at",     "autumnal",
    "beach",     "beaches",   "beautiful", "beside",    "between",    "big",    "bird",
    "birds",     "bridge",    "bright",    "brown",     "bush",       "bushes", "cactus",
    "castle",    "center",    "city",      "cloud",     "clouds",     "cloudy", "coast",
    "cold",      "colour",    "colourful", "creatures", "dark",       "dunes",  "everywhere",
    "fields",    "flower",    "flowers",   "full",      "game",       "garden", "gold",
    "golden",    "grass",     "green",     "grey",      "high",       "hill",   "hills",
    "hot",       "ice",       "island",    "lake",      "lava",       "left",   "lollipops",
    "magic",     "many",      "map",       "meadow",    "meadows",    "moon",   "moonlight",
    "mountain",  "mountains", "mushrooms", "my",        "mysterious", "north",  "northeast",
    "northwest", "not",       "ocean",     "oceans",    "our",        "path",   "paths",
    "pink",      "planet",    "plants",    "pond",      "pretty",     "purple", "quiet",
    "right",     "river",     "road",      "rock",      "rocks",      "rocky",  "sand",
    "see",       "shore",     "side",      "sky",       "snow",       "south",  "southeast",
    "southwest", "spring",    "stars",     "stone",     "stones",     "stormy", "sugar",
    "summery",   "sun",       "sweets",    "tall",      "that",       "their",  "through",
    "tiny",      "top",       "town",      "towns",     "tree",       "under",  "up",
    "valley",    "village",   "villages",  "volcano",   "walk",       "wall",   "warm",
    "we",        "wide",      "wild",      "wintry",    "wood",       "world",  "your",
    "forested",  "grove",     "snowy",
};

template <size_t N>
std::string_view any_of(Rng& rng, const std::string_view (&choices)[N]) {
  return choices[rng.below(static_cast<int>(N))];
}

std::string_view any_of(Rng& rng, Words choices) {
  return choices[rng.below(static_cast<int>(choices.size()))];
}

std::string with_article(const std::string& noun) {
  const bool vowel = std::string_view("aeiou").find(noun[0]) != std::string_view::npos;
  return (vowel ? "an " : "a ") + noun;
}

std::string landmark_name(const RegionSpec& region) {
  std::string name(kLandmarkColorNames[static_cast<int>(region.color)]);
  name += ' ';
  name += kLandmarkNames[static_cast<int>(region.landmark)];
  return name;
}

std::string place_name(int region, Rng& rng) {
  const std::string_view name =
      region == kMiddleRegion && rng.chance(40) ? any_of(rng, kMiddleNames) : kRegionNames[region];
  return "the " + std::string(name);
}

std::string fill_template(std::string_view pattern, const RegionSpec& region,
                          const std::string& place, Rng& rng) {
  std::string text;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '{') {
      text += pattern[i];
      continue;
    }
    const size_t close = pattern.find('}', i);
    const std::string_view slot = pattern.substr(i + 1, close - i - 1);
    i = close;
    if (slot == "the") text += place;
    if (slot == "T") {
      std::string theme(any_of(rng, kThemePhrases[static_cast<int>(region.theme)]));
      text += with_article(theme + ' ' + std::string(any_of(rng, kLandNouns)));
    }
    if (slot == "F") text += any_of(rng, kForestPhrases[static_cast<int>(region.forest)]);
    if (slot == "S") text += any_of(rng, kSeaPhrases[static_cast<int>(region.sea)]);
    if (slot == "L") text += with_article(landmark_name(region));
  }
  return text;
}

// Words of a text as the tokenizer sees them: lower case, "." and "," on their own, other
// punctuation as one of them.
std::vector<std::string> split_words(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  const auto close = [&] {
    if (!word.empty()) words.push_back(std::move(word));
    word.clear();
  };
  for (const char raw : text) {
    const auto c = static_cast<unsigned char>(raw);
    if (c == '.' || c == '!' || c == '?') {
      close();
      words.emplace_back(".");
    } else if (c == ',' || c == ';' || c == ':') {
      close();
      words.emplace_back(",");
    } else if (std::isspace(c) != 0 || c == '-' || c == '(' || c == ')' || c == '"') {
      close();
    } else if (c != '\'') {
      word += static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    }
  }
  close();
  return words;
}

size_t count_words(const std::vector<std::string>& sentences) {
  size_t n = 0;
  for (const std::string& s : sentences) n += split_words(s).size();
  return n;
}

void shuffle(std::vector<std::string>& items, Rng& rng) {
  for (size_t i = items.size(); i > 1; --i)
    std::swap(items[i - 1], items[static_cast<size_t>(rng.below(static_cast<int>(i)))]);
}

// Index of the list that contains `word`.
template <size_t N>
std::optional<int> find_key(const std::array<Words, N>& lists, const std::string& word) {
  for (size_t i = 0; i < N; ++i) {
    if (std::find(lists[i].begin(), lists[i].end(), word) != lists[i].end())
      return static_cast<int>(i);
  }
  return std::nullopt;
}

template <size_t N>
std::optional<int> find_name(const std::array<std::string_view, N>& names,
                             const std::string& word) {
  for (size_t i = 0; i < N; ++i) {
    if (word == names[i] || word == std::string(names[i]) + 's') return static_cast<int>(i);
  }
  return std::nullopt;
}

// What a stretch of text says about one region, as far as it says anything.
struct Reading {
  std::optional<int> theme, sea, forest, landmark, color;
};

// The region that is named at words[i]; sets how many words name it.
std::optional<int> region_at_word(const std::vector<std::string>& words, size_t i, size_t& length) {
  const std::string& w = words[i];
  const std::string next = i + 1 < words.size() ? words[i + 1] : "";
  length = 1;
  const auto starts = [&](std::string_view prefix) { return w.substr(0, prefix.size()) == prefix; };
  const auto side = [](std::string_view s) {
    return s == "west" || s == "western" ? 0 : s == "east" || s == "eastern" ? 2 : 1;
  };
  for (const std::string_view middle : kMiddleNames) {
    if (w == middle) return kMiddleRegion;
  }
  if (w == "west" || w == "western") return 3;
  if (w == "east" || w == "eastern") return 5;
  if (!starts("north") && !starts("south")) return std::nullopt;
  const int row = starts("north") ? 0 : 2;
  const std::string rest = w.substr(5);
  if (rest == "west" || rest == "east" || rest == "western" || rest == "eastern")
    return row * 3 + side(rest);
  if (!rest.empty() && rest != "ern") return std::nullopt;
  if (side(next) != 1) length = 2;
  return row * 3 + side(next);
}

void read_word(const std::vector<std::string>& words, size_t i, Reading& reading) {
  const auto keep_first = [](std::optional<int>& field, std::optional<int> value) {
    if (!field) field = value;
  };
  const std::string& w = words[i];
  keep_first(reading.theme, find_key(kThemeKeys, w));
  keep_first(reading.sea, find_key(kSeaKeys, w));
  keep_first(reading.forest, find_key(kForestKeys, w));
  if (const auto kind = find_name(kLandmarkNames, w)) {
    keep_first(reading.landmark, kind);
    if (i > 0) keep_first(reading.color, find_name(kLandmarkColorNames, words[i - 1]));
  }
}

void apply(const Reading& reading, RegionSpec& region) {
  if (reading.theme) region.theme = static_cast<Theme>(*reading.theme);
  if (reading.sea) region.sea = static_cast<Sea>(*reading.sea);
  if (reading.forest) region.forest = static_cast<Forest>(*reading.forest);
  if (reading.landmark) region.landmark = static_cast<Landmark>(*reading.landmark);
  if (reading.color) region.color = static_cast<LandmarkColor>(*reading.color);
}

bool says_something(const Reading& r) {
  return r.theme || r.sea || r.forest || r.landmark;
}

std::vector<std::string> build_vocabulary() {
  std::set<std::string> words;
  const auto add = [&](std::string_view text) {
    for (const std::string& word : split_words(text)) {
      if (word[0] != '{') words.insert(word);
    }
  };
  const auto add_all = [&](const auto& texts) {
    for (const std::string_view text : texts) add(text);
  };
  const auto add_lists = [&](const auto& lists) {
    for (const Words list : lists) add_all(list);
  };
  add_lists(kThemePhrases);
  add_lists(kThemeKeys);
  add_lists(kSeaPhrases);
  add_lists(kSeaKeys);
  add_lists(kForestPhrases);
  add_lists(kForestKeys);
  add_lists(kWeatherSentences);
  add_lists(kWeatherKeys);
  add_all(kLandNouns);
  add_all(kMiddleNames);
  add_all(kRegionNames);
  add_all(kLandmarkNames);
  add_all(kLandmarkColorNames);
  for (const std::string_view name : kLandmarkNames) add(std::string(name) + 's');
  add_all(kRegionTemplates);
  add_all(kOneLandTemplates);
  add_all(kIdleSentences);
  add_all(kExtraWords);
  add("a an");
  std::vector<std::string> vocabulary = {"<pad>", "<unk>"};
  vocabulary.insert(vocabulary.end(), words.begin(), words.end());
  return vocabulary;
}

}  // namespace

std::string describe(const MapSpec& spec, uint64_t seed) {
  Rng rng(hash_bits(seed, kPromptStream));
  std::vector<std::string> sentences;
  if (spec.one_land) {
    sentences.push_back(
        fill_template(any_of(rng, kOneLandTemplates), spec.regions[kMiddleRegion], "", rng));
  } else {
    for (int i = 0; i < kNumRegions; ++i) {
      const RegionSpec& region = spec.regions[i];
      if (!region.mentioned) continue;
      const std::string place = place_name(i, rng);
      sentences.push_back(fill_template(any_of(rng, kRegionTemplates), region, place, rng));
    }
  }
  const bool is_short = sentences.size() < kNumRegions;
  if (rng.chance(is_short ? 40 : 80)) {
    sentences.emplace_back(any_of(rng, kWeatherSentences[static_cast<int>(spec.weather)]));
  }
  const int num_idle = is_short && rng.chance(50) ? 0 : rng.below(11);
  for (int k = 0; k < num_idle; ++k) {
    sentences.emplace_back(any_of(rng, kIdleSentences));
    if (count_words(sentences) > kMaxPromptTokens) sentences.pop_back();
  }
  shuffle(sentences, rng);
  std::string text;
  for (const std::string& sentence : sentences) text += (text.empty() ? "" : " ") + sentence;
  return text;
}

MapSpec parse_prompt(std::string_view text, uint64_t seed) {
  const std::vector<std::string> words = split_words(text);
  std::array<Reading, kNumRegions> regions;
  Reading everywhere;  // said before any region was named
  std::optional<int> weather;
  std::optional<int> current;  // the region that the text speaks of
  for (size_t begin = 0; begin < words.size();) {
    const size_t end = static_cast<size_t>(
        std::find(words.begin() + static_cast<std::ptrdiff_t>(begin), words.end(), ".") -
        words.begin());
    // A sentence may name its region late ("a snowy land lies in the east"): what comes before
    // belongs to it too.
    size_t length = 1;
    for (size_t i = begin; i < end; i += length) {
      if (const auto named = region_at_word(words, i, length)) {
        current = named;
        break;
      }
    }
    for (size_t i = begin; i < end; i += length) {
      if (const auto named = region_at_word(words, i, length)) {
        current = named;
        continue;
      }
      if (!weather) weather = find_key(kWeatherKeys, words[i]);
      read_word(words, i, current ? regions[*current] : everywhere);
    }
    begin = end + 1;
  }

  MapSpec spec = sample_spec(seed);
  const bool names_regions = std::any_of(regions.begin(), regions.end(), says_something);
  spec.one_land = !names_regions && says_something(everywhere);
  if (spec.one_land) spec.regions.fill(spec.regions[kMiddleRegion]);
  for (int i = 0; i < kNumRegions; ++i) {
    spec.regions[i].mentioned = spec.one_land || says_something(regions[i]);
    apply(everywhere, spec.regions[i]);
    apply(regions[i], spec.regions[i]);
  }
  if (weather) spec.weather = static_cast<Weather>(*weather);
  return spec;
}

const std::vector<std::string>& vocabulary() {
  static const std::vector<std::string> words = build_vocabulary();
  return words;
}

std::vector<int32_t> tokenize(std::string_view text) {
  const std::vector<std::string>& known = vocabulary();
  std::vector<int32_t> ids;
  for (const std::string& word : split_words(text)) {
    const auto it = std::lower_bound(known.begin() + 2, known.end(), word);
    const bool found = it != known.end() && *it == word;
    ids.push_back(found ? static_cast<int32_t>(it - known.begin()) : kUnknownToken);
  }
  return ids;
}

}  // namespace longtake::overworld
