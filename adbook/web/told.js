// What the exhibit says of what the reader has just done. The sentences were checked against returns of many goals: a test
// plays them. Families differ, so some have words of their own.

const EVERYWHERE = {
  ready: "The weights are frozen. All that can change is the network's memory, and it is empty.",
  loading: "Loading the network …",
  start: "Nobody tells it where the goal is: it acts, reads its rewards, and the returns rise from episode to episode.",
  newTask: "Another goal, an empty memory: it begins at the bottom and climbs again.",
  moved: "The goal moves, the memory stays: it keeps to what was paid before, and comes over slowly. Now try Forget.",
  movedBlind: "The goal moves, and with the reward withheld nothing tells it so.",
  forgot: "The same goal, an empty memory: as lost as in its first episode, and as quick to learn.",
  withheldFresh: "An empty memory and no rewards: nothing can be found out, and the returns stay low.",
  withheldLater: "Without rewards what it knew fades, episode by episode. Press Forget to see it begin without them.",
  paid: "It is paid again.",
  meanFresh: "Without random actions it finds a fair place sooner, and stays there: exploring is part of what it has learnt to do.",
  meanLater: "Now it takes its best guess at every step: once the goal is known, exploring only costs.",
  sampled: "It explores again.",
  away: "Paused while the page was out of sight.",
};

const BY_FAMILY = {
  "half-cheetah-vel": {
    loading: "Loading the network, and MuJoCo for the robot (10 MB) …",
    start: "Nobody tells it how fast it should run: it acts, reads its rewards, and the returns rise from episode to episode.",
    withheldLater: "What it knows it keeps, even without rewards: it runs on as before. Press Forget to see it begin without them.",
    meanFresh: "Without random actions it hardly moves at first, and finds nothing out: exploring is part of what it has learnt to do.",
  },
  "pusher-goal": {
    loading: "Loading the network, and MuJoCo for the robot (10 MB) …",
    start: "The returns rise from episode to episode. But does it need its rewards for that? Withhold them, then press Forget.",
    moved: "The goal moves, and the returns hardly change: what it learns here does not depend on where the goal is.",
    withheldFresh: "An empty memory and no rewards, and the returns rise all the same: it does not find out where the goal is.",
    withheldLater: "Without rewards it goes on as before. Press Forget to see it begin without them.",
    meanFresh: "Without random actions the returns are better from the start: large torques are what costs most here.",
  },
};

// event: what the reader did; session: what is played, or null before it is there.
export function sentence(event, family, session) {
  const blank = event === "newTask" || event === "forgot";
  let key = event;
  if (session?.withheld && blank) key = "withheldFresh";
  else if (session?.withheld && event === "moved") key = "movedBlind";
  else if (session?.deterministic && blank) key = "meanFresh";
  else if (event === "withheld" || event === "mean") key += session.fresh ? "Fresh" : "Later";
  return BY_FAMILY[family]?.[key] || EVERYWHERE[key];
}
