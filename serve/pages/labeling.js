/**
 * @file The labeling page: answers to compare come in, judgements go out. This file joins the parts and decides what is
 * on the screen; each part knows one thing.
 */

import { announce } from "./announcer.js";
import { AnswerCards } from "./answer_cards.js";
import { Api, Refused, Unreachable } from "./api.js";
import { recall, remember } from "./device.js";
import { enableDragging } from "./drag.js";
import { byId } from "./element.js";
import { Judgement } from "./judgement.js";
import { Keyboard } from "./keyboard.js";
import { Outbox } from "./outbox.js";
import { showOutbox } from "./outbox_notice.js";
import { inWords } from "./problem.js";
import { showPrompt } from "./prompt_view.js";
import * as rankings from "./ranking.js";
import { RankingTray } from "./ranking_tray.js";
import { SignIn, isIntroduced, labelerName } from "./sign_in.js";
import { askOwnPrompt, requestTask } from "./tasks.js";
import { addToToday, countToday } from "./today.js";

/**
 * @typedef {"sign-in" | "message" | "ask" | "work"} View
 * @typedef {"compare" | "ask"} Mode where answers come from: the server's tasks, or a prompt of the person's own
 * @typedef {import("./ranking.js").Ranking} Ranking
 */

const RETRY_SECONDS = 5;
const DEFAULT_COUNT = "4";

class LabelingPage {
  #api = new Api();
  /** @type {Mode} */
  #mode = recall("mode") === "ask" ? "ask" : "compare";
  /** @type {Judgement | null} what is being judged now */
  #judgement = null;
  /** Ends what the screen waits for, when it shows something else. */
  #waiting = new AbortController();
  /** @type {HTMLSelectElement} */
  #count = byId("count");
  /** @type {HTMLTextAreaElement} */
  #ownPrompt = byId("own-prompt");
  /** @type {HTMLTextAreaElement} */
  #comment = byId("comment");
  /** @type {HTMLTextAreaElement} */
  #demonstration = byId("demonstration");
  #signIn = new SignIn((key) => this.#signedIn(key));
  #outbox = new Outbox(this.#api, {
    onChange: () => showOutbox(byId("outbox"), this.#outbox),
    onAcknowledged: (entry) => this.#acknowledged(entry),
    onKeyNeeded: (refused) => this.#showSignIn(true, inWords(refused)),
  });
  #cards = new AnswerCards(byId("answers"), {
    onPick: (candidate) => this.#place(candidate),
    onRate: (candidate, rating) => this.#rate(candidate, rating),
  });
  #tray = new RankingTray(byId("tray"), {
    place: (candidate) => this.#place(candidate),
    takeOut: (candidate) => this.#rankWith((ranking) => rankings.takeOut(ranking, candidate), candidate),
    shift: (candidate, direction) =>
      this.#rankWith((ranking) => rankings.shift(ranking, candidate, direction), candidate),
    tie: () => this.#tie(),
    allBad: () => this.#allBad(),
    undo: () => this.#undo(),
    submit: () => this.#submit(),
  });

  constructor() {
    const rank = (/** @type {string} */ key) => this.#place(Number(key) - 1);
    const keyboard = new Keyboard({
      ...Object.fromEntries([..."123456789"].map((key) => [key, rank])),
      "=": () => this.#tie(),
      0: () => this.#allBad(),
      z: () => this.#undo(),
      Enter: () => this.#submit(),
      "?": () => this.#showHelp(),
    });
    const single = /** @type {HTMLInputElement} */ (byId("keys-enabled"));
    single.checked = keyboard.enabled;
    single.addEventListener("change", () => {
      keyboard.enabled = single.checked;
    });
    enableDragging((dragged, target) => this.#drop(Number(dragged), target));
    this.#listen();
  }

  #listen() {
    byId("open-help").addEventListener("click", () => this.#showHelp());
    byId("who").addEventListener("click", () => this.#showSignIn(false));
    byId("skip").addEventListener("click", () => this.#leaveWork());
    byId("mode-compare").addEventListener("click", () => this.#enter("compare"));
    byId("mode-ask").addEventListener("click", () => this.#enter("ask"));
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#answerOwnPrompt();
    });
    this.#ownPrompt.value = recall("own-prompt") ?? "";
    this.#ownPrompt.addEventListener("input", () => remember("own-prompt", this.#ownPrompt.value));
    this.#count.value = recall("count") ?? DEFAULT_COUNT;
    this.#count.addEventListener("change", () => remember("count", this.#count.value));
    for (const field of [this.#comment, this.#demonstration]) {
      field.addEventListener("input", () => this.#write());
    }
    document.addEventListener("visibilitychange", () => {
      this.#judgement?.stopwatch.visibilityChanged();
      this.#judgement?.save();
    });
  }

  /** Ask for a key if the server needs one and for a name if it is not known, then go on where the person was. */
  async start() {
    this.#showDay();
    try {
      await this.#api.get("/v1/models");
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        this.#showSignIn(true);
        return;
      }
      // Any other answer is told when a task is asked for: a key without the scope for completions can still judge.
    }
    if (isIntroduced()) this.#goOn();
    else this.#showSignIn(false);
  }

  #goOn() {
    this.#outbox.send();
    this.#enter(this.#mode);
  }

  /** @param {Mode} mode */
  #enter(mode) {
    this.#mode = mode;
    remember("mode", mode);
    byId("mode-compare").ariaPressed = String(mode === "compare");
    byId("mode-ask").ariaPressed = String(mode === "ask");
    const resumed = Judgement.resume(this.#draft, labelerName());
    if (resumed) this.#judge(resumed);
    else this.#next();
  }

  #next() {
    if (this.#mode === "compare") this.#nextTask();
    else this.#show("ask", this.#ownPrompt);
  }

  get #draft() {
    return `draft.${this.#mode}`;
  }

  async #nextTask() {
    const signal = this.#show("work");
    byId("prompt").replaceChildren();
    this.#cards.show(this.#wanted.count, true);
    try {
      this.#judge(new Judgement(await requestTask(this.#api, { ...this.#wanted, signal }), this.#draft));
    } catch (error) {
      if (!signal.aborted) this.#failed(error, () => this.#nextTask());
    }
  }

  async #answerOwnPrompt() {
    const prompt = this.#ownPrompt.value;
    const signal = this.#show("work");
    showPrompt(byId("prompt"), { prompt });
    this.#cards.show(this.#wanted.count, true);
    this.#tray.showStop(() => this.#next());
    try {
      const wanted = { ...this.#wanted, signal };
      const work = await askOwnPrompt(this.#api, prompt, wanted, (texts) => this.#cards.setTexts(texts));
      this.#ownPrompt.value = "";
      remember("own-prompt", "");
      this.#judge(new Judgement(work, this.#draft));
    } catch (error) {
      if (!signal.aborted) this.#failed(error, () => this.#answerOwnPrompt());
    }
  }

  get #wanted() {
    return { count: Number(this.#count.value), labeler: labelerName() };
  }

  /** @param {Judgement} judgement */
  #judge(judgement) {
    this.#show("work");
    this.#judgement = judgement;
    judgement.save();
    const { work, ranking, ratings } = judgement;
    showPrompt(byId("prompt"), work.asked);
    this.#cards.show(ranking.count, false);
    this.#cards.setTexts(work.candidates);
    this.#cards.setRatings(ratings);
    this.#comment.value = judgement.comment;
    this.#demonstration.value = judgement.demonstration;
    for (const field of [this.#comment, this.#demonstration]) {
      /** @type {HTMLDetailsElement} */ (field.closest("details")).open = field.value !== "";
    }
    byId("extras").hidden = false;
    this.#showRanking();
    byId("prompt-title").focus();
    announce(`${ranking.count} answers to compare`);
  }

  #showRanking() {
    const judgement = this.#judgement;
    if (!judgement) return;
    this.#cards.setRanking(judgement.ranking);
    this.#tray.show(judgement.ranking, judgement.canUndo);
  }

  /**
   * @param {(ranking: Ranking) => Ranking} step
   * @param {number} [candidate] whose new place is announced
   * @returns {Ranking | undefined} the new ranking
   */
  #rankWith(step, candidate) {
    const judgement = this.#judgement;
    if (!judgement) return undefined;
    judgement.rank(step(judgement.ranking));
    this.#showRanking();
    const { ranking } = judgement;
    if (candidate !== undefined) {
      const ready = rankings.isComplete(ranking) ? " All are ranked: Enter submits." : "";
      announce(`Answer ${candidate + 1}: ${rankings.standing(ranking, candidate)}.${ready}`);
    }
    return ranking;
  }

  /** @param {number} candidate */
  #place(candidate) {
    if (candidate >= Number(this.#judgement?.ranking.count)) return;
    this.#rankWith((ranking) => rankings.place(ranking, candidate), candidate);
  }

  #tie() {
    const ranking = this.#rankWith(rankings.tie);
    if (ranking?.count === 2) announce("Tied. Enter submits.");
    else if (ranking) announce(ranking.tieNext ? "The next number ties with the last." : "No tie.");
  }

  #allBad() {
    if (this.#rankWith(rankings.allBad)) announce("All bad. Enter submits.");
  }

  #undo() {
    if (!this.#judgement?.canUndo) return;
    this.#judgement.undo();
    this.#showRanking();
    announce("Undone.");
  }

  /**
   * @param {number} candidate
   * @param {string} target a `data-drop` of the tray's
   */
  #drop(candidate, target) {
    const [kind, at] = target.split(":");
    this.#rankWith((ranking) => {
      if (kind === "group") return rankings.joinGroup(ranking, candidate, Number(at));
      if (kind === "gap") return rankings.insertGroup(ranking, candidate, Number(at));
      return rankings.takeOut(ranking, candidate);
    }, candidate);
  }

  /**
   * @param {number} candidate
   * @param {import("./rating_form.js").Rating | null} rating
   */
  #rate(candidate, rating) {
    if (!this.#judgement) return;
    this.#judgement.ratings[candidate] = rating;
    this.#judgement.save();
  }

  #write() {
    if (!this.#judgement) return;
    this.#judgement.comment = this.#comment.value;
    this.#judgement.demonstration = this.#demonstration.value;
    this.#judgement.save();
  }

  #submit() {
    const judgement = this.#judgement;
    if (!judgement) return;
    const { ranking, halfRated } = judgement;
    const missing = ranking.count - rankings.rankedCount(ranking);
    if (missing > 0) {
      this.#complain(ranking.count === 2 ? "Choose the better answer first" : `Rank ${missing} more first`);
      return;
    }
    if (halfRated >= 0) {
      this.#complain(`Answer ${halfRated + 1} has flags but no overall quality: choose one, or clear its rating`);
      this.#cards.askForOverall(halfRated);
      return;
    }
    this.#outbox.put(judgement.entries());
    this.#leaveWork();
  }

  /** @param {string} problem why nothing was submitted */
  #complain(problem) {
    this.#tray.say(problem);
    announce(problem);
  }

  #leaveWork() {
    this.#judgement?.discard();
    scrollTo({ top: 0 });
    this.#next();
  }

  /** @param {import("./outbox.js").Entry} entry */
  #acknowledged(entry) {
    if (entry.ratings) addToToday(labelerName());
    this.#showDay();
  }

  #showDay() {
    const labeler = labelerName();
    const count = countToday(labeler);
    byId("today").textContent = count > 0 ? `${count} today` : "";
    byId("who").hidden = !isIntroduced();
    byId("who").textContent = labeler ?? "no name";
    byId("who").ariaLabel = `You are ${labeler ?? "without a name"}: change`;
  }

  /**
   * @param {boolean} keyNeeded
   * @param {string} [problem]
   */
  #showSignIn(keyNeeded, problem) {
    this.#show("sign-in");
    this.#signIn.ask(keyNeeded, problem);
  }

  /** @param {string | null} key null where none was asked for */
  #signedIn(key) {
    if (key !== null) this.#api.signIn(key);
    this.#showDay();
    this.#goOn();
  }

  /**
   * @param {unknown} error
   * @param {() => void} again
   */
  #failed(error, again) {
    if (error instanceof Refused && error.needsKey) {
      this.#showSignIn(true, inWords(error));
      return;
    }
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    const passes = error instanceof Unreachable || error.passes;
    const signal = this.#show("message");
    const absent = error instanceof Refused && error.status === 404;
    byId("message-title").textContent = passes ? "Not now" : absent ? "Nothing to compare yet" : "That did not work";
    byId("message-text").textContent = inWords(error) + (passes ? " The page keeps trying." : "");
    byId("message-retry").onclick = again;
    announce(byId("message-text").textContent);
    if (!passes) return;
    const seconds = Math.max(RETRY_SECONDS, (error instanceof Refused && error.retryAfterSeconds) || 0);
    const timer = setTimeout(again, seconds * 1000);
    signal.addEventListener("abort", () => clearTimeout(timer));
    addEventListener("online", again, { signal });
  }

  /**
   * Show one part of the page and end what the last one waited for.
   *
   * @param {View} view
   * @param {HTMLElement} [focus]
   * @returns {AbortSignal} aborted when something else is shown
   */
  #show(view, focus) {
    this.#waiting.abort();
    this.#waiting = new AbortController();
    this.#judgement = null;
    for (const name of ["sign-in", "message", "ask", "work"]) byId(name).hidden = name !== view;
    byId("modes").hidden = view === "sign-in";
    byId("extras").hidden = true;
    this.#tray.hide();
    focus?.focus();
    return this.#waiting.signal;
  }

  #showHelp() {
    /** @type {HTMLDialogElement} */ (byId("help")).showModal();
  }
}

new LabelingPage().start();
